"""Whole-matrix initialisations over ranks: the same bits everywhere, and one process's numbers."""

import copy
import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from made_tensors import Made
from own_loops import place
from ranks import Pools
from refusals import refusal
from run_training import Runs, relative_error, same_bits, train
from sampling import full, joined
from tiny import VOCABULARY, whole
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import dlora.training.build
from dlora import LoraConfig, UsageError, attach, load_adapter, shard, start_from_gradients
from dlora.adapters.open_adapter import open_adapter
from dlora.config.load import parse
from dlora.lora.attach import adapter_tensors, frozen_tensors, named_adapters
from dlora.lora.init.pissa import Pissa
from dlora.methods.lora_ga import GradientEstimate
from dlora.sharding.topology import Topology
from dlora.training.prepare import prepare

STEPS, SAVED = 6, 3
LENGTHS = [24, 9, 17, 30, 12]  # of the sequences that the gradient is estimated on


def sequences() -> list[Tensor]:
    draw = torch.Generator().manual_seed(4)
    return [torch.randint(VOCABULARY, (1, length), generator=draw) for length in LENGTHS]


def summed_loss(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss * (ids.numel() - 1)


def products(adapter: Any) -> list[Tensor]:
    """Of A and of B alone what does not depend on the signs of singular vectors, and of both."""
    A, B = adapter.offset_A, adapter.offset_B
    return [A.t() @ A, B @ B.t(), B @ A]


def own_loop(
    path: str, name: str, engine: str, base: str, attach_first: bool, dtype: str
) -> dict[str, Any]:
    """Adapters started in a loop of one's own; their tensors, and what they compute."""
    rank, world = place()
    model = whole(path, dtype)
    ids = sequences()[0]
    with torch.no_grad():
        before = model(ids).logits
    config = LoraConfig(r=3, init_lora_weights=name, use_rslora=True)
    torch.manual_seed(rank)
    calls = []
    factorise = Pissa.factors.__func__  # type: ignore[attr-defined]
    Pissa.factors = classmethod(lambda *args: calls.append(1) or factorise(*args))  # type: ignore
    try:
        if attach_first:
            attach(model, config)
        replica = shard(model, engine=engine, base=base)
        if not attach_first:
            attach(model, config)
    finally:
        Pissa.factors = classmethod(factorise)  # type: ignore[method-assign]
    if name == "lora_ga":
        with pytest.raises(UsageError, match="start_from_gradients"):
            replica.reduce_gradients()
        start_from_gradients(model, sequences()[rank::world], summed_loss)
        replica.reduce_gradients()
    with torch.no_grad():
        after = model(ids).logits
    return {
        "tensors": {name: t.detach().clone() for name, t in adapter_tensors(model).items()},
        "products": {path: products(adapter) for path, _, adapter in named_adapters(model)},
        "unchanged": float((after - before).abs().max()),
        "factorised": len(calls),
    }


CASES = [  # ranks, initialisation, engine, base, whether attached first, dtype
    (2, "pissa", "fsdp2", "world", False, "float32"),
    (2, "milora", "zero3", "world", True, "float32"),
    (2, "pissa", "zero3", "world", False, "bfloat16"),
    (2, "lora_ga", "fsdp2", "world", True, "float64"),
    full((2, "lora_ga", "zero3", "world", False, "float32")),
    (3, "lora_ga", "fsdp2", "none", False, "float64"),
    full((3, "pissa", "fsdp2", "world", True, "float32")),
]


@pytest.mark.parametrize("case", CASES, ids=joined)
def test_ranks_start_from_the_same_bits_and_as_one_process_does(
    pools: Pools, saved_models: Any, case: tuple[Any, ...]
) -> None:
    """§6, T5 and §8, T4: the gradient's estimate is that of the union of the ranks' batches."""
    world, name, *_, dtype = case
    results = pools(world).run(own_loop, saved_models("llama"), *case[1:])
    (one,) = pools(1).run(own_loop, saved_models("llama"), *case[1:])
    assert len(results[0]["tensors"]) == 4 * 14
    for result in results:
        assert same_bits(result["tensors"], results[0]["tensors"])
        assert result["unchanged"] < (1e-5 if dtype != "bfloat16" else 1e-6)
        for path, found in result["products"].items():
            wanted = one["products"][path]
            if name != "lora_ga":
                assert all(map(torch.equal, found, wanted)), path
                continue
            # Directions: rounding counts by the gaps between singular values.
            tolerance = 1e-5 if dtype == "float64" else 1e-2
            for got, expected in zip(found, wanted, strict=True):
                assert relative_error(got, expected) < tolerance, path
    if name == "pissa":
        assert sum(result["factorised"] for result in results) == 14
        assert max(result["factorised"] for result in results) <= -(-14 // world)


# -- the estimate ---------------------------------------------------------------------------------


def test_no_gradient_of_a_weight_is_ever_formed(saved_models: Any) -> None:
    """What is made of a layer has a side of q, while autograd would make all gradients whole."""
    model = whole(saved_models("llama"))
    attach(model, LoraConfig(r=2, init_lora_weights="lora_ga"))
    estimate = GradientEstimate(model, Topology.current())
    weights = {layer.sizes for layer in estimate.layers}
    with Made() as made:
        estimate.run(sequences(), summed_loss)
    assert not {*made.shapes} & (weights | {(n, m) for m, n in weights})
    assert {*made.shapes} >= {(layer.sizes[0], 16) for layer in estimate.layers}
    plain = whole(saved_models("llama"))
    with Made() as made:
        summed_loss(plain, sequences()[0]).backward()
    assert {*made.shapes} >= weights


def ragged(path: str, sizes: list[int]) -> dict[str, Tensor]:
    """Offsets where each rank has another number of batches."""
    rank, _ = place()
    model = whole(path, "float64")
    attach(model, LoraConfig(r=3, init_lora_weights="lora_ga"))
    shard(model, base="world")
    start = sum(sizes[:rank])
    start_from_gradients(model, sequences()[start : start + sizes[rank]], summed_loss)
    return {path: torch.stack(products(adapter)[:1]) for path, _, adapter in named_adapters(model)}


def test_the_estimate_serves_as_the_gradient_does(saved_models: Any) -> None:
    """§8, T1 with autograd's own gradient of weights twice as wide as what is kept."""
    model, plain = (whole(saved_models("llama"), "float64") for _ in range(2))
    attach(model, LoraConfig(r=3, init_lora_weights="lora_ga"))
    start_from_gradients(model, sequences(), summed_loss)
    for ids in sequences():
        summed_loss(plain, ids).backward()
    for path, _, adapter in named_adapters(model):
        G = plain.get_parameter(f"{path}.weight").grad
        A, B = adapter.lora_A.detach(), adapter.lora_B.detach()
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        wanted = len(G) ** 0.5 / 16 * (U[:, :6] * S[:6] @ Vh[:6])
        assert relative_error(B @ B.t() @ G + G @ A.t() @ A, wanted) < 0.05, path


def test_ranks_that_run_short_pass_with_weight_zero(pools: Pools, saved_models: Any) -> None:
    (one,) = pools(1).run(ragged, saved_models("llama"), [5])
    for found in pools(2).run(ragged, saved_models("llama"), [4, 1]):
        assert all(relative_error(found[path], one[path]) < 1e-5 for path in one)


def refused(path: str) -> list[str]:
    """What is said of a base that others have sharded, and of ranks without batches."""
    model = whole(path)
    fully_shard(model)
    said = refusal(attach, model, LoraConfig(r=3, init_lora_weights="pissa"))
    assert not hasattr(model, "dlora")
    attach(model, LoraConfig(r=3, init_lora_weights="lora_ga"))
    shard(model, base="world")
    batches = sequences() if place()[0] else []
    return [said, refusal(start_from_gradients, model, batches, summed_loss)]


def test_what_cannot_start_is_refused_on_every_rank(pools: Pools, saved_models: Any) -> None:
    for sharded, idle in pools(2).run(refused, saved_models("llama")):
        assert "call dlora.shard first" in sharded
        assert idle == "start_from_gradients: every rank needs a batch, and some have none"


# -- the training command -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(words: Any) -> Any:
    common = {"output__save_every": SAVED, "train__max_steps": STEPS}
    return functools.partial(words, adapter__lora_dropout=0.1, **common)


def test_the_output_head_has_no_gradient_to_start_from(command: Any, tmp_path: Path) -> None:
    settings = {"adapter__init_lora_weights": "lora_ga", "adapter__target_modules": ["lm_head"]}
    with pytest.raises(UsageError, match="^adapter.target_modules: lm_head is the output head"):
        prepare(parse(command(tmp_path / "run", **settings), "").config, Topology(0, 1, 1), print)


@pytest.mark.full
def test_recomputed_activations_change_nothing(run: Runs) -> None:
    settings = {"adapter__init_lora_weights": "lora_ga", "train__max_steps": 1}
    [plain], _ = run("plain", 1, work=trained, **settings)
    settings["sharding__activation_checkpointing"] = True
    [recomputed], _ = run("recomputed", 1, work=trained, **settings)
    for name, value in plain["frozen"].items():
        assert relative_error(recomputed["frozen"][name], value) < 1e-2


def trained(argv: list[str]) -> dict[str, Any]:
    """A run, the offsets that it has, how often W0 was factorised, and what it computes."""
    run: list[Any] = []
    starts, start = [], dlora.training.build.initialise
    dlora.training.build.initialise = lambda *args: starts.append(1) or start(*args)
    try:
        result = train(argv, run.append)
    finally:
        dlora.training.build.initialise = start
    model = run[0].model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(12)[None], use_cache=False).logits
    frozen = {name: tensor.clone() for name, tensor in frozen_tensors(model).items()}
    with run[0].checkpoints._snapshots.newest() as snapshot:  # what a rank can commit alone
        if snapshot is not None:
            assert same_bits(snapshot.files["adapter"], {**result["tensors"], **frozen})
    planned = run[0].prepared.budget.memory.offsets
    assert planned == sum(tensor.nbytes for tensor in frozen.values())
    return {**result, "frozen": frozen, "starts": len(starts), "logits": logits}


RUNS = [
    ("pissa", {"sharding__engine": "fsdp2", "sharding__base": "world"}),
    ("lora_ga", {"sharding__engine": "zero3", "sharding__base": "world"}),
    full("milora", {"sharding__base": "none", "sharding__optimizer_state": "divided"}),
]


@pytest.mark.parametrize(("name", "where"), RUNS)
def test_a_run_is_that_of_one_process_and_resumes_bit_for_bit(
    run: Runs, saved_models: Any, tmp_path: Path, name: str, where: dict[str, Any]
) -> None:
    settings = {"adapter__init_lora_weights": name}
    if name == "lora_ga":
        settings["adapter__lora_ga_batches"] = 3
    through, again = tmp_path / "through", tmp_path / "again"
    _, one = run("one", 1, **settings)
    results, lines = run("through", 2, work=trained, **settings, **where)
    for got, wanted in zip(lines, one, strict=True):
        tolerance = 1e-5 if name != "lora_ga" else 1e-4
        assert got["loss"] == pytest.approx(wanted["loss"], rel=tolerance)
    assert same_bits(results[0]["frozen"], results[1]["frozen"])
    assert len(results[0]["frozen"]) == 28 and results[0]["starts"] == 1
    shutil.copytree(through, again)
    shutil.rmtree(again / "checkpoints" / f"step-{STEPS:06d}")
    resumed, _ = run("again", 2, work=trained, **settings, **where)
    for got, wanted in zip(resumed, results, strict=True):
        assert got["starts"] == 0
        assert same_bits(got["tensors"], wanted["tensors"])
        assert same_bits(got["frozen"], wanted["frozen"])
    # From the same checkpoint on one process, and as a file.
    shutil.rmtree(again / "checkpoints" / f"step-{STEPS:06d}")
    [alone], _ = run("again", 1, work=trained, **settings)
    assert same_bits(alone["frozen"], results[0]["frozen"])
    for parameter, value in alone["tensors"].items():
        assert relative_error(value, results[0]["tensors"][parameter]) < 1e-4
    source = open_adapter(through / "checkpoints" / f"step-{STEPS:06d}")
    base = whole(saved_models("llama"))
    model = load_adapter(copy.deepcopy(base), through / "adapter").eval()
    source.attach_to(base)
    source.load_into(base)
    for found in (base, model):
        with torch.no_grad():
            logits = found.eval()(input_ids=torch.arange(12)[None], use_cache=False).logits
        torch.testing.assert_close(logits, results[0]["logits"], rtol=1e-4, atol=1e-4)
