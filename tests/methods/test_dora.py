"""DoRA on a sharded base: what one process computes, without a byte more than its own gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from own_loops import BASES, batches, started
from packed_runs import check_method
from ranks import Pools
from run_training import Runs, check_near, relative_error, same_bits
from safetensors.torch import load_file
from sampling import full
from stopped_runs import crashed

from dlora import LoraConfig, UsageError, attach
from dlora.adapters.save_load import WEIGHTS
from dlora.export.command import main
from dlora.lora.attach import named_adapters
from dlora.sharding.replica.replicated_state import ReplicatedState

STEPS = 5
RUN = {"adapter__use_dora": True, "adapter__lora_dropout": 0.1, "optimizer__loraplus_lr_ratio": 2}


@pytest.mark.parametrize(
    ("engine", "name", "world"),
    [
        full("fsdp2", "none", 3),  # 10 s; own loops below are on a plain base
        ("zero3", "nf4", 2),
        full("fsdp2", "int8", 3),
        full("zero3", "none", 3),
        full("fsdp2", "nf4-dq", 2),
    ],
)
def test_a_run_is_that_of_one_process_and_what_peft_computes(
    run: Runs, saved_models: Any, tmp_path: Path, engine: str, name: str, world: int
) -> None:
    settings = RUN | {"output__save_every": STEPS, "train__max_steps": STEPS}
    check_method(run, saved_models("blocks"), engine, name, world, **settings)
    [saved] = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert main(["--adapter", str(saved), "--to", str(tmp_path / "again")]) == 0
    files = [tmp_path / name / WEIGHTS for name in ("again", "run/adapter")]
    assert same_bits(*map(load_file, files))


def test_a_run_goes_on_from_its_checkpoint(run: Runs) -> None:
    """Norms come from W0 again, magnitudes from the checkpoint; on the other engine as well."""
    settings = RUN | {"output__save_every": 2, "train__max_steps": 4, "sharding__base": "world"}
    stopped, _ = run("run", 2, work=crashed, arguments=(3,), **settings)
    assert stopped == ["crashed"] * 2
    again = run("run", 2, sharding__engine="zero3", **settings)
    check_near(again, run("whole", 1, **settings))


def own_loop(path: str, base: str, attach_first: bool, dora: bool) -> dict[str, Any]:
    """A few steps of a loop of one's own; what they send, and what they come to."""
    config = LoraConfig(r=4, lora_alpha=8, use_dora=dora)
    model, replica = started(path, base, config, attach_first)
    start = {path: adapter for path, _, adapter in named_adapters(model)}
    magnitudes = {p: a.lora_magnitude_vector.detach().clone() for p, a in start.items() if dora}
    optimizer = torch.optim.AdamW(replica.parameter_groups(lr=2e-3), fused=True)
    sent = []
    for ids in batches(STEPS, 6):
        replica.wire.take()
        model(input_ids=ids, labels=ids).loss.backward()
        replica.reduce_gradients()
        sent.append(replica.wire.take())
        optimizer.step()
        optimizer.zero_grad()
    replica.audit()
    reduced = 4 * ReplicatedState.lengths(replica.named, replica.topology)[1]
    return {
        "magnitudes": magnitudes,
        "trained": {name: p.detach().clone() for name, p in replica.named.items()},
        "sent": sent[1:-1],
        "reduced": reduced,
    }


@pytest.mark.parametrize(
    ("base", "attach_first"),
    [
        ("sharded by dlora", True),
        ("sharded by dlora", False),
        ("partitioned by dlora", True),
        full("partitioned by dlora", False),
        ("sharded by transformers", False),
        ("partitioned by the user", False),
        full("sharded by the user", False),
    ],
)
def test_an_own_loop_is_that_of_one_process_for_the_bytes_of_a_lora(
    pools: Pools, saved_models: Any, base: str, attach_first: bool
) -> None:
    path = saved_models("llama")
    [alone] = pools(1).run(own_loop, path, "sharded by dlora", True, True)
    results = pools(2).run(own_loop, path, base, attach_first, True)
    plain = pools(2).run(own_loop, path, base, attach_first, False)
    for result, lora in zip(results, plain, strict=True):
        for name, magnitude in alone["magnitudes"].items():
            assert torch.equal(result["magnitudes"][name], magnitude), name
        for name, tensor in alone["trained"].items():
            assert relative_error(result["trained"][name], tensor) < 1e-5, name
        more = result["reduced"] - lora["reduced"]  # of 2 ranks each sends as much as there is
        assert more > 0
        assert result["sent"] == [sent + more for sent in lora["sent"]]


def attach_to_what_the_user_sharded(path: str, base: str) -> str:
    try:
        attach(BASES[base](path), LoraConfig(use_dora=True))
    except UsageError as error:
        return str(error)
    return "attached"


@pytest.mark.parametrize("base", ["sharded by the user", "partitioned by the user"])
def test_a_base_that_dlora_does_not_know_is_sharded_is_refused(
    pools: Pools, saved_models: Any, base: str
) -> None:
    for said in pools(2).run(attach_to_what_the_user_sharded, saved_models("llama"), base):
        assert said == ("attach: dora starts from W0: weight is sharded; call dlora.shard first")
