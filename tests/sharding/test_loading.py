"""Reading a checkpoint into shards: the same values, owned, evenly divided, block by block."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Pools
from refusals import refusal
from tiny import whole
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dlora.base.model import find_base
from dlora.sharding.engines.gather_groups import block_lists
from dlora.sharding.engines.protocol import build_engine
from dlora.sharding.engines.storage import held_bytes
from dlora.sharding.topology import Topology, resolve_placement

IDS = torch.arange(1, 25).view(2, 12)

# model, dtype on disk, dtype asked for, base, engine
CASES = [
    ("llama", "float32", "float32", "world", "fsdp2"),
    ("llama", "bfloat16", "bfloat16", "world", "fsdp2"),
    ("llama", "float32", "bfloat16", "world", "fsdp2"),
    ("llama", "float32", "bfloat16", "none", "fsdp2"),
    ("tied", "bfloat16", "bfloat16", "world", "fsdp2"),
    ("gpt2", "float32", "float32", "world", "fsdp2"),
    ("gpt2", "float32", "bfloat16", "world", "fsdp2"),
    ("mixtral", "float32", "float32", "world", "fsdp2"),
    ("mixtral", "bfloat16", "bfloat16", "world", "fsdp2"),
    ("llama", "float32", "bfloat16", "world", "zero3"),
    ("tied", "bfloat16", "bfloat16", "world", "zero3"),
    ("gpt2", "float32", "float32", "world", "zero3"),
    ("mixtral", "float32", "bfloat16", "world", "zero3"),
]


def loaded(path: str, dtype: str, base: str, name: str) -> dict[str, Any]:
    """A base read by the engine: its values and how this rank holds them."""
    topology = Topology.current()
    engine = build_engine(resolve_placement(name, base, topology), topology)
    model: Any = find_base(path, dtype=dtype).load(engine, torch.device("cpu"))
    engine.shard(model, ignored=(), device=None)
    engine.after_load(model)
    blocks = [b for p in block_lists(model) for b in model.get_submodule(p).children()]
    maps = Path("/proc/self/maps").read_text()
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    held, borrowed = held_bytes(model), [n for n, t in tensors(model).items() if not owns(t)]
    with engine.gather_module(model) as weights:
        values = {name: weight.clone() for name, weight in weights.items()}
    return {
        "values": values,
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "logits": model(input_ids=IDS, use_cache=False).logits.detach(),
        "held": held,
        "total": sum(value.nbytes for value in values.values()),
        "borrowed": borrowed,
        "mapped": [line for line in maps.splitlines() if line.endswith(".safetensors")],
        "units": sum(map(is_unit, blocks)),
        "blocks": len(blocks),
        "frozen": frozen,
    }


def is_unit(block: nn.Module) -> bool:
    """Gathered by itself: by FSDP2 as a whole, by ZeRO-3 in its parts."""
    return isinstance(block, FSDPModule) or all(
        hasattr(parameter, "ds_id") for parameter in block.parameters()
    )


def plain(path: str, dtype: str) -> dict[str, Any]:
    """The same model as transformers reads it into one process."""
    model = whole(path, dtype)
    return {
        "values": {name: p.detach() for name, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
        "logits": model(IDS).logits.detach(),
    }


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def owns(tensor: Tensor) -> bool:
    """Its storage holds its elements and nothing else, in memory of the process."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    local = getattr(tensor, "ds_tensor", local)
    storage = local.untyped_storage()
    return storage.nbytes() == local.nbytes and storage.filename is None


def check_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize(("model", "stored", "dtype", "base", "engine"), CASES)
def test_shards_hold_the_checkpoint(
    pools: Pools, saved_models: Any, model: str, stored: str, dtype: str, base: str, engine: str
) -> None:
    path = saved_models(model, stored)
    [wanted] = pools(1).run(plain, path, dtype)
    for got in pools(2).run(loaded, path, dtype, base, engine):
        check_same(got["values"], wanted["values"])
        check_same(got["buffers"], wanted["buffers"])
        assert torch.equal(got["logits"], wanted["logits"])
        assert got["frozen"]
        assert got["borrowed"] == []
        assert got["mapped"] == []
        if base == "world":
            assert got["units"] == got["blocks"] > 0
            assert got["held"] <= 1.02 * got["total"] / 2
        else:
            assert got["held"] == got["total"]


def shares(path: str, name: str = "fsdp2") -> int:
    topology = Topology.current()
    engine = build_engine(resolve_placement(name, "world", topology), topology)
    return held_bytes(find_base(path, dtype="float32").load(engine, torch.device("cpu")))


def refused(path: str) -> str:
    return refusal(shares, path)


def test_ranks_without_an_expert_are_refused_on_all_ranks(pools: Pools, saved_models: Any) -> None:
    wanted = (
        "sharding.base: model.layers.0.mlp.experts.gate_up_proj has 4 experts, so some of 3 "
        "ranks would get none; shard W0 over fewer ranks (base: node, or none)"
    )
    assert pools(3).run(refused, saved_models("mixtral")) == [wanted] * 3


@pytest.mark.parametrize("world", [3, 4])
def test_uneven_shards_add_up_to_one_model(pools: Pools, saved_models: Any, world: int) -> None:
    [wanted] = pools(1).run(plain, saved_models("llama"), "float32")
    held = pools(world).run(shares, saved_models("llama"))
    assert sum(held) == sum(value.nbytes for value in wanted["values"].values())


def test_partitions_are_equal_and_padded(pools: Pools, saved_models: Any) -> None:
    """Every rank holds ⌈numel / ranks⌉ of each parameter; 4 experts on 3 ranks are no trouble."""
    [wanted] = pools(1).run(plain, saved_models("mixtral"), "float32")
    share = sum(4 * -(-value.numel() // 3) for value in wanted["values"].values())
    assert pools(3).run(shares, saved_models("mixtral"), "zero3") == [share] * 3
