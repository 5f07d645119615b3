"""A packed base over ranks: the bits of the whole packed, and the passes of one process."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import edit_json
from ranks import Pools
from run_training import relative_error
from sampling import joined
from tiny import VOCABULARY, whole
from torch import Tensor

from dlora.base.model import find_base
from dlora.base.quantize import quantize
from dlora.lora.attach import named_adapters
from dlora.lora.config import LoraConfig
from dlora.methods.attach import attach
from dlora.methods.trained_replica import replicate
from dlora.quant.formats import FORMATS
from dlora.sharding.engines.protocol import build_engine
from dlora.sharding.engines.storage import held_bytes
from dlora.sharding.topology import Topology, resolve_placement


def placed(path: str, dtype: str, name: str, engine: str, base: str, from_files: bool) -> Any:
    """(model, replica) of a packed base, read by the engine or quantised in memory and sharded."""
    topology = Topology.current()
    built = build_engine(resolve_placement(engine, base, topology), topology)
    if from_files:
        base_model = find_base(path, dtype=dtype, quantization=name)
        model = base_model.load(built, torch.device("cpu"))
    else:
        model = whole(path, dtype)
        quantize(model, name)
    return model, replicate(model, built)


# -- what ranks hold -------------------------------------------------------------------------------


def loaded(path: str, dtype: str, name: str, engine: str, base: str) -> dict[str, Any]:
    """The values of a base that was packed while it was read, and what this rank holds of it."""
    model, replica = placed(path, dtype, name, engine, base, from_files=True)
    held = held_bytes(model)
    with replica.engine.gather_module(model) as weights:
        values = {name: weight.clone() for name, weight in weights.items()}
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    return {"values": values, "held": held, "frozen": frozen}


def packed_whole(path: str, dtype: str, name: str) -> dict[str, Tensor]:
    """The same base as transformers reads it, each weight packed as a whole."""
    model = whole(path, dtype)
    values: dict[str, Tensor] = {}
    paths = quantize(whole(path, dtype), name).packed
    for full_name, parameter in model.named_parameters():
        owner = full_name.removesuffix(".weight")
        if owner in paths:
            values[f"{owner}.weight_codes"] = FORMATS[name].codes(parameter.detach())
            values[f"{owner}.weight_scales"] = FORMATS[name].scales(parameter.detach())
        else:
            values[full_name] = parameter.detach()
    return values


@pytest.mark.parametrize(
    "case",  # model, dtype in its files, dtype, quantization, engine, base, ranks
    [
        ("blocks", "float32", "bfloat16", "nf4", "fsdp2", "world", 2),
        ("blocks", "bfloat16", "bfloat16", "nf4-dq", "fsdp2", "world", 3),
        ("blocks", "float32", "float32", "int8", "fsdp2", "node", 4),
        ("blocks", "float32", "float32", "fp8", "fsdp2", "world", 2),
        ("tied_blocks", "bfloat16", "bfloat16", "nf4", "fsdp2", "world", 3),
        ("gpt2_blocks", "float32", "bfloat16", "nf4", "fsdp2", "world", 2),
        ("ragged", "float32", "bfloat16", "nf4", "fsdp2", "world", 2),
        ("mixtral", "float32", "bfloat16", "int8", "fsdp2", "world", 2),
        ("tied_blocks", "float32", "bfloat16", "nf4", "fsdp2", "none", 2),
        ("gpt2_blocks", "bfloat16", "bfloat16", "int8", "fsdp2", "none", 1),
        ("blocks", "float32", "bfloat16", "nf4", "zero3", "world", 2),
        ("blocks", "bfloat16", "bfloat16", "nf4-dq", "zero3", "world", 3),
        ("tied_blocks", "bfloat16", "bfloat16", "int8", "zero3", "node", 4),
        ("gpt2_blocks", "float32", "bfloat16", "nf4", "zero3", "world", 3),
        ("mixtral", "float32", "float32", "int8", "zero3", "world", 3),
    ],
    ids=joined,
)
def test_shards_of_the_packed_are_the_packed_shards(
    pools: Pools, saved_models: Any, case: tuple[Any, ...]
) -> None:
    """Every rank packs its own rows, and together they are the bits of the whole packed."""
    model, stored, dtype, name, engine, base, world = case
    path = saved_models(model, stored)
    [wanted] = pools(1).run(packed_whole, path, dtype, name)
    results = pools(world).run(
        loaded, path, dtype, name, engine, base, ranks_per_node=-(-world // 2)
    )
    total = sum(value.nbytes for value in wanted.values())
    size = {"none": 1, "node": world // 2, "world": world}[base]
    for got in results:
        assert list(got["values"]) == list(wanted)
        for parameter, value in wanted.items():
            assert got["values"][parameter].dtype == value.dtype, parameter
            assert torch.equal(got["values"][parameter], value), parameter
        assert got["frozen"]
        assert got["held"] <= 1.05 * total / size  # uneven rows and padding
    assert sum(got["held"] for got in results) >= total * world / size


def answers(path: str, engine: str) -> list[Any]:
    model, _ = placed(path, "float32", "int8", engine, "world", from_files=True)
    return [model.generation_config.eos_token_id, model.training]


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_packed_base_knows_where_an_answer_ends(
    pools: Pools, saved_models: Any, tmp_path: Path, engine: str
) -> None:
    """As after transformers' own loading, generation settings are those in the base's files."""
    model = Path(shutil.copytree(saved_models("blocks"), tmp_path / "model"))
    edit_json(model / "generation_config.json", eos_token_id=[7, 9])
    assert pools(2).run(answers, str(model), engine) == [[[7, 9], False]] * 2


# -- what they compute -----------------------------------------------------------------------------


def passes(
    path: str, dtype: str, name: str, engine: str, base: str, from_files: bool, recomputed: bool
) -> dict[str, Tensor]:
    """Logits and the gradients of A and B, of one batch on every rank."""
    model, replica = placed(path, dtype, name, engine, base, from_files)
    attach(model, LoraConfig(r=4))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, _, adapter in named_adapters(model):
            for factor in (adapter.lora_A, adapter.lora_B):
                factor.copy_(0.1 * torch.randn(factor.shape, generator=draw))
    if recomputed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.randint(VOCABULARY, (2, 9), generator=draw)
    result = {}
    for turn in ("first", "second"):  # the second one gathers again what the first has freed
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        result[f"{turn} logits"] = out.logits.detach()
        result |= {f"{turn} {n}": p.grad.clone() for n, p in replica.named.items()}
        replica.release()
        replica.zero_grad()
    return result


@pytest.mark.parametrize(
    "case",  # model, dtype, quantization, engine, base, ranks, read by the engine, recomputed
    [
        ("blocks", "float32", "nf4", "fsdp2", "world", 2, True, False),
        ("blocks", "bfloat16", "nf4-dq", "fsdp2", "world", 3, True, True),
        ("tied_blocks", "bfloat16", "int8", "fsdp2", "node", 4, True, False),
        ("gpt2_blocks", "float32", "nf4", "fsdp2", "world", 3, False, False),
        ("blocks", "bfloat16", "nf4", "fsdp2", "none", 2, True, True),
        ("blocks", "float32", "nf4", "zero3", "world", 2, True, True),
        ("blocks", "bfloat16", "nf4-dq", "zero3", "world", 3, True, False),
        ("tied_blocks", "bfloat16", "int8", "zero3", "node", 4, False, False),
        ("gpt2_blocks", "float32", "nf4", "zero3", "world", 3, True, False),
    ],
    ids=joined,
)
def test_passes_are_those_of_one_process(
    pools: Pools, saved_models: Any, case: tuple[Any, ...]
) -> None:
    """Bit for bit; under ZeRO-3, whose hooks change the order in which autograd adds, gradients are
    equal to rounding.
    """
    model, dtype, name, engine, base, world, from_files, recomputed = case
    path = saved_models(model, dtype)
    [wanted] = pools(1).run(passes, path, dtype, name, "fsdp2", "none", False, False)
    results = pools(world).run(
        passes, path, dtype, name, engine, base, from_files, recomputed, ranks_per_node=world // 2
    )
    rounding = 1e-5 if dtype == "float32" else 0.02
    for got in results:
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            if engine == "zero3" and "logits" not in key:
                assert relative_error(got[key], value) < rounding, key
            else:
                assert torch.equal(got[key], value), key
