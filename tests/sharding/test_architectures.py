"""Less usual architectures under both engines: one unit per block, planned bytes, the own loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import IDS, loss_of, save_tiny, tiny_model
from counted_runs import check_last_step, last_step
from ranks import Pools
from run_training import command_line, train
from sampling import full
from tiny import save_chats
from torch.distributed.fsdp import FSDPModule

from dlora import LoraConfig, attach, shard
from dlora.config.recompute import Recompute
from dlora.metrics.log import read_metrics
from dlora.plan.trace import trace
from dlora.sharding.engines.gather_groups import block_lists

ATTENTION = ["q_proj", "k_proj", "v_proj"]


def words(root: Path, kind: str, name: str, **settings: Any) -> list[str]:
    """A run of three steps on two ranks, each with one micro-batch."""
    base, chats = root / kind, root / "chats.jsonl"
    if not base.exists():
        save_tiny(base, kind)
        save_chats(chats, 8)
    usual = {
        "model__path": str(base),
        "data__train": str(chats),
        "adapter__target_modules": ATTENTION,
        "output__dir": str(root / name),
        "sharding__base": "world",
        "train__max_steps": 3,
        "train__global_batch_size": 2,
        "train__micro_batch_size": 1,
    }
    return command_line(**usual | settings)


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(directory / "metrics.jsonl")]


def sharded(kind: str, engine: str) -> tuple[float, int, int]:
    """(loss, blocks that are units, blocks) of a model that `shard` distributes."""
    model = attach(tiny_model(kind), LoraConfig(r=2, target_modules=ATTENTION))
    shard(model, engine=engine, base="world")
    blocks = [b for path in block_lists(model) for b in model.get_submodule(path).children()]
    units = [block for block in blocks if isinstance(block, FSDPModule)]
    return loss_of(model), len(units), len(blocks)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("kind", ["jamba", full("nemotron_h")])
def test_blocks_of_different_classes_are_units(
    pools: Pools, tmp_path: Path, kind: str, engine: str
) -> None:
    """Mamba reads weights of layers that it does not call, which ZeRO-3 has to gather as well."""
    wanted = loss_of(tiny_model(kind))
    for loss, units, blocks in pools(2).run(sharded, kind, engine):
        assert loss == pytest.approx(wanted)
        assert blocks == 4
        assert units == (4 if engine == "fsdp2" else 0)
    argv = words(tmp_path, kind, "run", sharding__engine=engine)
    for result in pools(2).run(last_step, argv):
        check_last_step(result)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_blocks_that_share_weights_are_one_unit(pools: Pools, engine: str) -> None:
    wanted = loss_of(tiny_model("zamba"))
    for loss, units, blocks in pools(2).run(sharded, "zamba", engine):
        assert loss == pytest.approx(wanted)
        assert (units, blocks) == (6 if engine == "fsdp2" else 0, 6)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize(("kind", "targets"), [("ctrl", ["Wq", "Wv"]), full("jetmoe", ["kv_proj"])])
def test_classes_without_activation_checkpointing_recompute(
    pools: Pools, tmp_path: Path, kind: str, targets: list[str], engine: str
) -> None:
    assert not tiny_model(kind).supports_gradient_checkpointing
    for name, how in (("saved", False), ("recomputed", True)):
        settings = {"sharding__activation_checkpointing": how, "sharding__engine": engine}
        argv = words(tmp_path, kind, name, adapter__target_modules=targets, **settings)
        pools(2).run(train, argv)
    assert losses(tmp_path / "recomputed") == pytest.approx(losses(tmp_path / "saved"), rel=1e-6)


def test_recomputed_blocks_save_their_input_alone() -> None:

    with torch.device("meta"):
        model = tiny_model("ctrl")
    attach(model, LoraConfig(r=2, target_modules=["Wq"]))
    every, none = Recompute(1), Recompute()
    saved = [trace(model, *IDS.shape, checkpointing=how).saved for how in (every, none)]
    assert saved[0] < saved[1] / 3
