"""What breaks elsewhere and must not break here: promises that no other test file shows.

Other tests name the promise that they show ("promise 1.11"); the last test here counts them all.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from collectives import CollectiveLog
from own_loops import join_deepspeed
from ranks import Pools
from refusals import refusal
from run_training import Runs, check_near
from tiny import VOCABULARY, whole

from dlora import LoraConfig, attach, save_adapter, shard
from dlora.base.model import find_base
from dlora.lora.attach import attach as attach_adapters
from dlora.sharding.engines.protocol import build_engine
from dlora.sharding.topology import Topology, resolve_placement

ENGINES = ("fsdp2", "zero3")


def saved_when_partitioned(path: str, directory: str) -> str:
    import deepspeed

    import dlora.sharding.engines.zero3  # noqa: F401 - chooses the accelerator

    model = attach(whole(path), LoraConfig(r=2))
    join_deepspeed()
    deepspeed.zero.Init(module=model, mem_efficient_linear=False)
    return refusal(save_adapter, model, directory)


def test_an_empty_placeholder_is_never_saved(
    pools: Pools, saved_models: Any, tmp_path: Path
) -> None:
    """promise 1.3: where ZeRO-3 left an empty placeholder, nothing is written."""
    told = pools(2).run(saved_when_partitioned, saved_models("llama"), str(tmp_path / "adapter"))
    assert all("is empty; refusing to write it" in said for said in told)
    assert not (tmp_path / "adapter").exists()


def flat_parameters(path: str) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(whole(path), device_id=torch.device("cpu"))
    return refusal(shard, model)


def test_fsdp1_is_refused(pools: Pools, saved_models: Any) -> None:
    """promise 1.6: A and B never enter a flat parameter."""
    told = pools(2).run(flat_parameters, saved_models("llama"))
    assert all(said.startswith("shard: this model is wrapped by FSDP1") for said in told)


@pytest.mark.parametrize(
    ("engine", "base", "world", "per_node"),
    [("fsdp2", "node", 4, 2), ("fsdp2", "world", 2, 2), ("zero3", "world", 2, 2)],
)
def test_one_norm_over_adapters_and_trained_copies(
    run: Runs, engine: str, base: str, world: int, per_node: int
) -> None:
    """promise 1.10: the norm that clips is that of one process, beside a copy of a sharded head."""
    settings = {"adapter__modules_to_save": ["lm_head"], "optimizer__max_grad_norm": 0.1}
    settings["train__max_steps"] = 4
    where = {"sharding__engine": engine, "sharding__base": base}
    many = run("many", world, per_node=per_node, **settings, **where)
    assert any("lm_head" in name for name in many[0][0]["tensors"])
    assert all(line["grad_norm"] > 0.1 for line in many[1])  # it clips
    check_near(many, run("one", 1, **settings))


def logits_of_resized(path: str, engine: str) -> tuple[Any, Any]:
    """A model with more tokens than it was trained with, whole, and then adapted and sharded."""
    torch.manual_seed(0)
    model = whole(path)
    model.resize_token_embeddings(VOCABULARY + 5)
    ids = torch.tensor([[1, 2, VOCABULARY + 4]])
    wanted = model(ids).logits.detach()
    attach(model, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    shard(model, engine=engine, base="world")
    return wanted, model(ids).logits.detach()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", ["llama", "tied"])
def test_a_resized_vocabulary(pools: Pools, saved_models: Any, engine: str, model: str) -> None:
    """promise 1.12: more tokens, an adapted embedding, tied or not."""
    for wanted, got in pools(2).run(logits_of_resized, saved_models(model), engine):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def collectives_of_attach(path: str, name: str) -> tuple[int, dict[str, Any]]:
    topology = Topology.current()
    engine = build_engine(resolve_placement(name, "world", topology), topology)
    model = find_base(path, dtype="float32").load(engine, torch.device("cpu"))
    engine.shard(model, ignored=(), device=None)
    with CollectiveLog() as log:
        attach_adapters(model, LoraConfig(r=2))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    return len(log.calls), shapes


@pytest.mark.parametrize("engine", ENGINES)
def test_attaching_reads_shapes_and_gathers_nothing(
    pools: Pools, saved_models: Any, engine: str
) -> None:
    """promise 1.16: shapes are those of the whole weights, also beside stacked experts."""
    path = saved_models("mixtral")
    plain = attach(whole(path), LoraConfig(r=2))
    wanted = {n: tuple(p.shape) for n, p in plain.named_parameters() if p.requires_grad}
    assert pools(2).run(collectives_of_attach, path, engine) == [(0, wanted)] * 2


APPLY = {
    *(f"1.{number}" for number in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16)),
    *(f"2.{number}" for number in range(1, 10)),
    *("3.1", "3.2", "3.3", "3.4", "4.1", "4.2", "4.4", "4.5", "4.6"),
}


def test_every_promise_that_applies_is_shown() -> None:
    """1.13 and 3.5 need methods to come, 1.15 several adapters; 4.3 is a comparison."""
    read: Callable[[Path], str] = lambda path: path.read_text("utf-8")  # noqa: E731
    sources = map(read, Path(__file__).parents[1].rglob("test_*.py"))
    named = {n for source in sources for n in re.findall(r"promise (\d\.\d+)[:,;]", source)}
    assert named >= APPLY
