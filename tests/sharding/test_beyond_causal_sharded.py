"""Models that are no causal language models on two ranks: as in one process, unit by unit."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from beyond_causal import KINDS, Kind, loss_of, output_of
from causal_models import quiet_peft, randomize_trainable, relative_error
from own_loops import place
from ranks import Pools
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from dlora import LoraConfig, attach, load_adapter, save_adapter, shard
from dlora.adapters.save_load import WEIGHTS
from dlora.sharding.engines.gather_groups import block_lists
from dlora.sharding.engines.protocol import is_divided

pytestmark = quiet_peft
SAMPLE = [("bert sequences", "fsdp2"), ("t5", "zero3"), ("clip", "zero3"), ("unet", "fsdp2")]
# Every kind on both engines takes minutes; the sample has one of each sort of model.
EVERY = [
    case if case in SAMPLE else pytest.param(*case, marks=pytest.mark.full)
    for case in ((name, engine) for name in KINDS for engine in ("fsdp2", "zero3"))
]


def rows_of(kind: Kind, step: int) -> dict[str, Any]:
    """This rank's rows of a batch."""
    rank, world = place()
    batch = kind.batch(step)
    rows = kind.rows(batch)
    return {
        name: value.chunk(world)[rank] if name in rows else value for name, value in batch.items()
    }


def trained(name: str, engine: str, out: str) -> dict[str, Any]:
    """Three steps of SGD on the mean loss, and what there was to see."""
    kind = KINDS[name]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=kind.targets)
    model = attach(kind.model(), config)
    randomize_trainable(model)
    replica = shard(model, engine=engine, base="world")
    frozen = {n: p for n, p in model.named_parameters() if ".adapter." not in n}
    whole = [name for name, parameter in frozen.items() if not is_divided(parameter)]
    optimizer = torch.optim.SGD(replica.parameter_groups(lr=1e-2))
    losses = []
    for step in range(3):
        loss = loss_of(model, rows_of(kind, step))
        loss.backward()
        replica.reduce_gradients()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    replica.audit()
    save_adapter(model, Path(out) / f"{engine}-{place()[0]}")
    loaded = kind.model()
    shard(loaded, engine=engine, base="world")
    load_adapter(loaded, Path(out) / f"{engine}-{place()[0]}")
    batch = kind.batch(9)
    with torch.no_grad():
        outputs = [output_of(m, batch) for m in (model, loaded)]
    return {
        "losses": torch.stack(losses),
        "outputs": outputs,
        "units": [path for path, m in model.named_modules() if isinstance(m, FSDPModule)],
        "whole": whole,
    }


@pytest.mark.parametrize(("name", "engine"), EVERY)
def test_two_ranks_train_as_one(name: str, engine: str, pools: Pools, tmp_path: Path) -> None:
    (alone,) = pools(1).run(trained, name, engine, str(tmp_path / "alone"))
    both = pools(2).run(trained, name, engine, str(tmp_path / "both"))
    means = torch.stack([rank["losses"] for rank in both]).mean(0)
    assert relative_error(means, alone["losses"]) < 1e-5
    reference = load_file(tmp_path / "alone" / f"{engine}-0" / WEIGHTS)
    for rank, found in enumerate(both):
        saved = load_file(tmp_path / "both" / f"{engine}-{rank}" / WEIGHTS)
        assert saved.keys() == reference.keys()
        for key, tensor in reference.items():
            assert relative_error(saved[key], tensor) < 1e-4, key
        for output in found["outputs"]:
            assert relative_error(output, alone["outputs"][0]) < 1e-4
    kind = KINDS[name]
    loaded = peft.PeftModel.from_pretrained(kind.model(), tmp_path / "both" / f"{engine}-0")
    assert relative_error(output_of(loaded, kind.batch(9)), alone["outputs"][0]) < 1e-4
    if engine == "fsdp2":
        assert both[0]["whole"] == []
        lists = block_lists(kind.model())
        assert {path.rpartition(".")[0] for path in both[0]["units"] if path} == set(lists)


@pytest.mark.parametrize("name", KINDS)
def test_the_units_are_the_blocks(name: str) -> None:
    kind = KINDS[name]
    model = kind.model()
    lists = block_lists(model)
    assert set(kind.units) <= set(lists)
    inside = sum(p.numel() for path in lists for p in model.get_submodule(path).parameters())
    assert inside > 0.45 * sum(p.numel() for p in model.parameters())
