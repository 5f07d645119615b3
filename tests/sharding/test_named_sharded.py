"""Adapters by name on a sharded base: the numbers of one process, and what a swap sends."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from collectives import CollectiveLog
from own_loops import BASES, batches, place
from ranks import Pools
from run_training import relative_error, same_bits
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, whole

from dlora import (
    AdaLoraConfig,
    LoraConfig,
    UsageError,
    activate,
    attach,
    attached,
    load_adapter,
    remove,
    rename,
    replica_of,
    save_adapter,
    shard,
)
from dlora.lora.attach import every_parameter, trainable_parameters
from dlora.lora.names import active

STEPS = 4
FILES = {
    "lora": LoraConfig(r=3, target_modules=["q_proj", "down_proj"]),
    "wide": LoraConfig(r=5, lora_alpha=7, target_modules=["q_proj", "v_proj"], use_rslora=True),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "o_proj"]),
    "head": LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["lm_head"]),
}
TRAINED = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
DORA = LoraConfig(r=2, use_dora=True, target_modules=["v_proj"])


@pytest.fixture(scope="module")
def files(saved_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of each of `FILES`, with random values."""
    root = tmp_path_factory.mktemp("files")
    for number, (name, config) in enumerate(FILES.items()):
        torch.manual_seed(number)
        model = attach(whole(saved_models("llama")), config)
        with torch.no_grad():
            for parameter in trainable_parameters(model).values():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        save_adapter(model, root / name)
    return root


def logits(model: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(7)
    ids = torch.randint(VOCABULARY, (2, 9), generator=draw)
    with torch.no_grad():
        found = model(input_ids=ids).logits
    if (replica := replica_of(model)) is not None:
        replica.release()
    return found


def several(path: str, base: str, attach_first: bool, files: str) -> dict[str, Any]:
    """Two frozen ones from files, two trained beside them, each with its own optimizer."""
    model = BASES[base](path)
    engine = "zero3" if base == "partitioned by dlora" else "fsdp2"

    def attach_all() -> None:
        torch.manual_seed(place()[0])  # other values on each rank, until rank 0's are sent
        load_adapter(model, f"{files}/lora", "lora")
        attach(model, TRAINED, "trained")
        attach(model, DORA, "dora")
        load_adapter(model, f"{files}/wide", "wide")

    if attach_first:
        attach_all()
    shard(model, engine=engine, base="world")
    if not attach_first:
        attach_all()
    found = {}
    for names in (["lora"], ["wide", "lora"], ["trained", "wide"]):
        activate(model, names)
        found["+".join(names)] = logits(model)
    losses = []
    for name, beside in (("trained", "lora"), ("dora", "wide")):
        activate(model, [beside, name])
        replica = replica_of(model, name)
        optimizer = torch.optim.AdamW(replica.parameter_groups(lr=2e-3))
        for ids in batches(STEPS):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            replica.reduce_gradients()
            replica.clip(1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        replica.audit()
    activate(model, ["trained", "dora", "wide"])
    found["trained"] = logits(model)
    model.eval()
    ids = torch.arange(27).view(3, 9)
    with torch.no_grad():
        found["rows"] = model(input_ids=ids, adapter_names=["wide", "__base__", "trained"]).logits
    return {
        "losses": torch.stack(losses),
        "logits": found,
        "adapters": {n: p.detach().clone() for n, p in every_parameter(model).items()},
        "base": [n for n, _ in model.named_parameters() if ".adapters." not in n],
    }


@pytest.mark.parametrize(
    ("base", "attach_first"),
    [
        ("sharded by dlora", True),
        ("sharded by dlora", False),
        ("partitioned by dlora", True),
        ("partitioned by dlora", False),
        ("sharded by the user", False),  # dlora's engine gathers what a DoRA's norms are made of
    ],
)
def test_names_give_what_one_process_gives(
    pools: Pools, saved_models: Any, files: Path, base: str, attach_first: bool
) -> None:
    path = saved_models("llama")
    (one,) = pools(1).run(several, path, "sharded by dlora", True, str(files))
    results = pools(2).run(several, path, base, attach_first, str(files))
    loss = torch.stack([result["losses"] for result in results]).mean(0)
    torch.testing.assert_close(loss, one["losses"], rtol=1e-5, atol=0)
    for result in results:
        assert result["base"] == one["base"]
        assert same_bits(result["adapters"], results[0]["adapters"])
        for name, tensor in one["adapters"].items():
            assert relative_error(result["adapters"][name], tensor) < 1e-4, name
        for case, expected in one["logits"].items():
            torch.testing.assert_close(result["logits"][case], expected, rtol=1e-4, atol=1e-4)


def swapped(path: str, engine: str, files: str, out: str) -> dict[str, Any]:
    """One adapter after another under the same name, on a model that has run."""
    model = whole(path)
    load_adapter(model, f"{files}/lora", "a")
    shard(model, engine=engine, base="world")
    found: dict[str, Any] = {"lora": logits(model)}
    if place()[0]:
        files = f"{out}/none"  # rank 0 alone reads
    calls = {}
    for name in ("wide", "head", "lora", "dora"):
        with CollectiveLog() if name != "dora" else nullcontext() as log:
            load_adapter(model, f"{files}/{name}", "a")
        calls[name] = [(call.op, call.nbytes) for call in log.calls] if log else []
        assert active(model) == ["a"] and list(attached(model)) == ["a"]
        own = trainable_parameters(model, "a").values()
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in own}
        assert sum(storages.values()) == sum(p.nbytes for p in own)
        found[f"{name} swapped"] = logits(model)
    with CollectiveLog() as log:
        load_adapter(model, f"{files}/wide", "b", is_trainable=True)
        load_adapter(model, f"{files}/wide", "b")  # into the same parameters
    calls["trained"] = [(call.op, call.nbytes) for call in log.calls]
    activate(model, ["b"])
    found["trained"] = logits(model)
    found["named"] = list(replica_of(model, "b").named)
    remove(model, "b")
    found["removed"] = logits(model)
    return {"logits": found, "calls": calls}


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_swap_is_one_broadcast_of_its_bytes(
    pools: Pools, saved_models: Any, files: Path, tmp_path: Path, engine: str
) -> None:
    path = saved_models("llama")
    for result in pools(2).run(swapped, path, engine, str(files), str(tmp_path)):
        for name in FILES:
            stored = load_file(files / name / "adapter_model.safetensors").values()
            nbytes = sum(tensor.nbytes for tensor in stored)
            # Of a DoRA each W0 is gathered as well, for the norms of its rows.
            assert name == "dora" or result["calls"][name] == [("broadcast_", nbytes)], name
            expected = logits(load_adapter(whole(path), files / name))
            found = result["logits"][f"{name} swapped"]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert [op for op, _ in result["calls"]["trained"]] == ["broadcast_"] * 2
        wide = logits(load_adapter(whole(path), files / "wide"))
        torch.testing.assert_close(result["logits"]["trained"], wide, rtol=1e-5, atol=1e-5)
        assert all(".adapters.b." in name for name in result["logits"]["named"])
        expected = logits(whole(path))
        torch.testing.assert_close(result["logits"]["removed"], expected, rtol=1e-5, atol=1e-5)


def failing(path: str, engine: str, files: str, out: str) -> dict[str, Any]:
    model = whole(path)
    load_adapter(model, f"{files}/lora", "a")
    shard(model, engine=engine, base="world")
    attach(model, TRAINED, "b")
    activate(model, ["b", "a"])
    before = {n: p.detach().clone() for n, p in every_parameter(model).items()}
    expected, said = logits(model), []
    for name in ("nan", "cut", "none", "other"):
        for adapter in ("a", "b", "c"):
            with CollectiveLog() as log, pytest.raises(UsageError) as refused:
                load_adapter(model, f"{out}/{name}", adapter)
            assert not log.calls
            said.append(str(refused.value))
    after = {n: p.detach().clone() for n, p in every_parameter(model).items()}
    assert same_bits(before, after)
    assert active(model) == ["b", "a"] and list(attached(model)) == ["a", "b"]
    assert torch.equal(logits(model), expected)
    replica_of(model, "b").audit()
    load_adapter(model, f"{files}/wide", "a")
    return {"said": said, "logits": logits(model)}


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_failed_swap_leaves_every_rank_as_it_was(
    pools: Pools, saved_models: Any, files: Path, tmp_path: Path, engine: str
) -> None:
    for name in ("nan", "cut", "other"):
        (tmp_path / name).mkdir()
        for file in (files / "wide").iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "nan" / "adapter_model.safetensors"
    tensors = load_file(weights)
    list(tensors.values())[-1][0] = float("inf")
    save_file(tensors, weights)
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    config = tmp_path / "other" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 2}))
    results = pools(2).run(failing, saved_models("llama"), engine, str(files), str(tmp_path))
    assert results[0]["said"] == results[1]["said"]
    assert torch.equal(results[0]["logits"], results[1]["logits"])


def other_methods(path: str, base: str) -> dict[str, Any]:
    """AdaLoRA and PiSSA by name, and what names cannot do on a sharded model."""
    model = whole(path)
    shard(model, base=base)
    torch.manual_seed(place()[0])
    targets = {"target_modules": ["q_proj"]}
    attach(model, AdaLoraConfig(init_r=3, target_r=1, total_step=STEPS, **targets), "ada")
    attach(model, LoraConfig(r=2, init_lora_weights="pissa", **targets), "pissa")
    norms = []
    for name in ("ada", "pissa"):
        activate(model, name)
        replica = replica_of(model, name)
        optimizer = torch.optim.AdamW(replica.parameter_groups(lr=2e-3))
        for ids in batches(STEPS):
            model(input_ids=ids, labels=ids).loss.backward()
            replica.reduce_gradients()
            norms.append(replica.clip(1.0))
            optimizer.step()
            optimizer.zero_grad()
        replica.audit()
    paths = attached(model)["ada"].adapted
    assert sum(model.get_submodule(f"{path}.adapters.ada").r for path in paths) == len(paths)
    with pytest.raises(UsageError, match="^rename: 'ada' is trained by a replica"):
        rename(model, "ada", "other")
    with pytest.raises(UsageError, match="^replica_of: the model trains no adapters named 'c'"):
        replica_of(model, "c")
    attach(model, TRAINED)
    attach(model, LoraConfig(r=2, **targets), "frozen", is_trainable=False)
    rename(model, "frozen", "other")
    remove(model, "default")
    attach(model, TRAINED)
    replica_of(model).audit()
    return {
        "norms": torch.stack(norms),
        "adapters": {n: p.detach().clone() for n, p in every_parameter(model).items()},
    }


def test_other_methods_have_names_too(pools: Pools, saved_models: Any) -> None:
    (one,) = pools(1).run(other_methods, saved_models("llama"), "none")
    results = pools(2).run(other_methods, saved_models("llama"), "world")
    for result in results:
        torch.testing.assert_close(result["norms"], one["norms"], rtol=1e-4, atol=0)
        assert same_bits(result["adapters"], results[0]["adapters"])
        for name, tensor in one["adapters"].items():
            if ".ada." in name or ".pissa." in name:
                assert relative_error(result["adapters"][name], tensor) < 1e-4, name
