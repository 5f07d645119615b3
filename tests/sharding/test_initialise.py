"""Whole-matrix initialisations over ranks: the same bits everywhere, and one process's numbers."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Pools
from run_training import relative_error, same_bits
from tiny import VOCABULARY
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from dlora import LoraConfig, UsageError, attach, shard, start_from_gradients
from dlora.gradient_estimate import GradientEstimate
from dlora.lora.attach import adapter_tensors, named_adapters
from dlora.lora.init.pissa import Pissa
from dlora.sharding.mesh import Topology

STEPS, SAVED = 6, 3
LENGTHS = [24, 9, 17, 30, 12]  # of the sequences that the gradient is estimated on


def place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sequences() -> list[Tensor]:
    draw = torch.Generator().manual_seed(4)
    return [torch.randint(VOCABULARY, (1, length), generator=draw) for length in LENGTHS]


def summed_loss(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss * (ids.numel() - 1)


def loaded(path: str, dtype: str = "float32") -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()


def products(adapter: Any) -> list[Tensor]:
    """What of A and B does not depend on signs of singular vectors, alone and in PiSSA together."""
    A, B = adapter.offset_A, adapter.offset_B
    return [A.t() @ A, B @ B.t(), B @ A]


def own_loop(
    path: str, name: str, engine: str, base: str, attach_first: bool, dtype: str
) -> dict[str, Any]:
    """Adapters started in a loop of one's own; their tensors, and what they compute."""
    rank, world = place()
    model = loaded(path, dtype)
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


CASES = [
    (2, "pissa", "fsdp2", "world", False, "float32"),
    (2, "milora", "zero3", "world", True, "float32"),
    (2, "pissa", "zero3", "world", False, "bfloat16"),
    (2, "lora_ga", "fsdp2", "world", True, "float64"),
    (2, "lora_ga", "zero3", "world", False, "float32"),
    (3, "lora_ga", "fsdp2", "none", False, "float64"),
    (3, "pissa", "fsdp2", "world", True, "float32"),
]


@pytest.mark.parametrize(("world", "name", "engine", "base", "attach_first", "dtype"), CASES)
def test_ranks_start_from_the_same_bits_and_as_one_process_does(
    pools: Pools,
    saved_models: Any,
    world: int,
    name: str,
    engine: str,
    base: str,
    attach_first: bool,
    dtype: str,
) -> None:
    """§6, T5 and §8, T4: the gradient's estimate is that of the union of the ranks' batches."""
    where = (engine, base, attach_first, dtype)
    results = pools(world).run(own_loop, saved_models("llama"), name, *where)
    (one,) = pools(1).run(own_loop, saved_models("llama"), name, *where)
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
            for got, expected in zip(found[:2], wanted[:2], strict=True):
                assert relative_error(got, expected) < tolerance, path
    if name == "pissa":
        assert sum(result["factorised"] for result in results) == 14
        assert max(result["factorised"] for result in results) <= -(-14 // world)


# -- the estimate ---------------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    """Notes the shapes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        if not func.is_view:
            self.seen |= {tuple(t.shape) for t in outputs if isinstance(t, Tensor)}
        return result


def test_no_gradient_of_a_weight_is_ever_formed(saved_models: Any) -> None:
    """What is made of a layer has a side of q, while autograd would make all gradients whole."""
    model = loaded(saved_models("llama"))
    attach(model, LoraConfig(r=2, init_lora_weights="lora_ga"))
    estimate = GradientEstimate(model, Topology.current())
    weights = {layer.sizes for layer in estimate.layers}
    with Shapes() as made:
        estimate.run(sequences(), summed_loss)
    assert not made.seen & (weights | {(n, m) for m, n in weights})
    assert made.seen >= {(layer.sizes[0], 16) for layer in estimate.layers}
    whole = loaded(saved_models("llama"))
    with Shapes() as made:
        summed_loss(whole, sequences()[0]).backward()
    assert made.seen >= weights
