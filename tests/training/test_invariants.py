"""Invariants 1 and 2: W0 keeps its names and its bits; A and B are one adapter on every rank."""

import contextlib
import io
from typing import Any

import pytest
import torch
from own_loops import steps
from ranks import Pools
from run_training import Runs, prepared_run
from sampling import full
from tiny import VOCABULARY, whole
from torch import Tensor

from dlora.base.model import find_base
from dlora.lora.config import LoraConfig
from dlora.methods.attach import attach
from dlora.methods.trained_replica import replicate
from dlora.sharding.engines.protocol import build_engine
from dlora.sharding.topology import Topology, resolve_placement

STEPS = 4
HEAD, WTE = {"modules_to_save": ["lm_head"]}, {"target_modules": ["c_attn", "wte"]}


def trained(path: str, dtype: str, name: str, base: str, config: dict[str, Any]) -> dict[str, Any]:
    """W0 before and after some steps, and the adapter; every rank draws numbers of its own."""
    topology = Topology.current()
    engine = build_engine(resolve_placement(name, base, topology), topology)
    model: Any = find_base(path, dtype=dtype).load(engine, torch.device("cpu"))
    replica = replicate(model, engine)
    before = gathered(engine, model)
    torch.manual_seed(100 + topology.rank)
    attach(model, LoraConfig(r=4, **config))
    first = {name: p.detach().clone() for name, p in replica.named.items()}
    optimizer = torch.optim.AdamW(replica.parameter_groups(lr=2e-3), fused=True)
    batches = (torch.randint(VOCABULARY, (2, 9)) for _ in range(STEPS))
    steps(replica, optimizer, (model(input_ids=ids, labels=ids).loss for ids in batches))
    return {
        "before": before,
        "after": {n: w for n, w in gathered(engine, model).items() if ".adapter." not in n},
        "first": first,
        "last": {name: p.detach() for name, p in replica.named.items()},
        "trainable": {name for name, p in model.named_parameters() if p.requires_grad},
    }


def gathered(engine: Any, model: Any) -> dict[str, Tensor]:
    with engine.gather_module(model) as weights:
        return {name: weight.clone() for name, weight in weights.items()}


def base_weights(path: str, dtype: str) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in whole(path, dtype).named_parameters()}


@pytest.mark.parametrize(
    ("model", "dtype", "engine", "base", "world", "config"),
    [
        ("llama", "bfloat16", "fsdp2", "world", 2, {}),
        ("llama", "float32", "fsdp2", "node", 4, {}),
        ("llama", "bfloat16", "fsdp2", "none", 3, {}),
        # 3 s each: tied weights and GPT-2 are below under the other engine
        full("tied", "bfloat16", "fsdp2", "world", 3, HEAD),
        full("gpt2", "bfloat16", "zero3", "world", 2, WTE),
        ("gpt2", "bfloat16", "fsdp2", "world", 2, WTE),
        ("llama", "bfloat16", "zero3", "node", 4, {}),
        ("tied", "bfloat16", "zero3", "world", 3, HEAD),
    ],
)
def test_training_changes_the_adapter_alone(
    pools: Pools,
    saved_models: Any,
    model: str,
    dtype: str,
    engine: str,
    base: str,
    world: int,
    config: dict[str, Any],
) -> None:
    """promise 1.1: one adapter, whatever the ranks' seeds.

    promise 1.9: W0 in bf16, A and B in float32, and every one of them moves.
    """
    path = saved_models(model, dtype)
    [wanted] = pools(1).run(base_weights, path, dtype)
    results = pools(world).run(
        trained, path, dtype, engine, base, config, ranks_per_node=-(-world // 2)
    )
    for result in results:
        for weights in (result["before"], result["after"]):
            assert weights.keys() == wanted.keys()
            assert all(weights[n].dtype == w.dtype for n, w in wanted.items())
            assert all(torch.equal(weights[n], w) for n, w in wanted.items())
        assert result["trainable"] == result["last"].keys() == result["first"].keys()
        for name, value in result["last"].items():
            assert value.dtype == torch.float32
            assert torch.equal(result["first"][name], results[0]["first"][name]), name
            assert torch.equal(value, results[0]["last"][name]), name
            assert not torch.equal(value, result["first"][name]), name  # every one has moved


def flipped_in_a_run(argv: list[str]) -> tuple[int, str]:
    """Status and last words of a run in which one bit of one tensor flips on rank 1, after step 3.

    Nothing is committed of it: Ray and Kubernetes would go on from what may be wrong.
    """
    run = prepared_run(argv)
    name, parameter = list(run.replica.named.items())[5]
    made = iter(range(1, 100))

    def flip(*_: Any) -> None:
        if next(made) == 3 and run.ranks.rank == 1:
            parameter.data.view(torch.int32)[0, 0] ^= 1 << 20

    run.optimizer.register_step_post_hook(flip)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = run.run()
    assert next(made) == 10  # the audit in the 10th reduction stopped it
    return status, said.getvalue().replace(name, "NAME")


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_run_stops_when_its_ranks_differ(run: Runs, engine: str) -> None:
    told = "dlora: error: the adapters are no longer the same on every rank: NAME on rank 1\n"
    ended, _ = run("run", 3, work=flipped_in_a_run, sharding__engine=engine)
    assert ended == [(1, told), (1, ""), (1, "")]
    assert not list((run.root / "run").glob("checkpoints/step-*"))
