"""A divided optimizer state against ordinary autograd and torch.optim, on whole tensors, in one
process; and what a rank holds and sends of it.
"""

import functools
from typing import Any

import pytest
import torch
import toy
from collectives import CollectiveLog
from ranks import Pools
from torch import nn
from toy import Toy, batch, divided, flat, gradients, groups, own_rank, replicated

from dlora.sharding.replica.replica import Replica

SHAPES = [(1, 1), (2, 2), (3, 3), (4, 2), (4, 1), (3, 2)]  # ranks, ranks per node
NUMEL = 37
# dtype, whether losses are summed over tokens, micro-batches, how gradients are zeroed, optimizer
CASES = [
    (torch.float64, True, 1, "replica", "AdamW"),
    (torch.float32, True, 3, "to none", "fused AdamW"),
    (torch.float64, False, 2, "to zero", "AdamW"),
    (torch.float64, False, 2, "to none", "SGD"),
]


def places(replica: Replica) -> dict[str, tuple[int, int]]:
    """Where the parts lie in the flat values, by their addresses."""
    first, size = replica.values.data_ptr(), replica.values.element_size()
    starts = {n: (p.data_ptr() - first) // size for n, p in replica.optimized.items() if len(p)}
    return {n: (start, start + len(replica.optimized[n])) for n, start in starts.items()}


# -- training -------------------------------------------------------------------------------------


def train(
    dtype: torch.dtype, by_tokens: bool, pieces: int, zeroing: str, name: str
) -> dict[str, Any]:
    model, replica, optimizer = divided(name, dtype)
    seen: dict[str, Any] = {"gradients": [], "norms": [], "values": []}
    for step in range(toy.STEPS):
        how = {"by_tokens": by_tokens, "pieces": pieces}
        toy.reduced(model, replica, step, spare=step == 1, **how)
        assert all(parameter.grad is None for parameter in model.parameters())
        seen["gradients"].append(gradients(replica.optimized))
        seen["norms"].append(replica.clip(toy.MAX_NORM))
        assert replica.gradient_norm() < 1.0001 * toy.MAX_NORM
        optimizer.step()
        seen["values"].append(flat(model))
        toy.ZEROING[zeroing](replica, optimizer)
    replica.audit()
    return seen | {"places": places(replica)}


def reference(
    dtype: torch.dtype, by_tokens: bool, zeroing: str, name: str, world: int
) -> dict[str, Any]:
    """The same steps on all rows at once."""
    model = Toy(dtype)
    named = dict(model.named_parameters())
    optimizer = toy.OPTIMIZERS[name](groups(named))
    seen: dict[str, Any] = {"gradients": [], "norms": [], "values": []}
    for step in range(toy.STEPS):
        toy.backward_of_all(model, step, world, spare=step == 1, by_tokens=by_tokens)
        seen["gradients"].append(gradients(named))
        seen["norms"].append(nn.utils.clip_grad_norm_(named.values(), toy.MAX_NORM))
        optimizer.step()
        seen["values"].append(flat(model))
        optimizer.zero_grad(set_to_none=zeroing != "to zero")
    return seen


def train_each() -> list[dict[str, Any]]:
    return [train(*case) for case in CASES]


@pytest.mark.parametrize(("world", "per_node"), SHAPES)
def test_training_equals_one_process(pools: Pools, world: int, per_node: int) -> None:
    offsets = {"A": 0, "b": 15, "B": 20, "spare": 30}
    by_rank = pools(world).run(train_each, ranks_per_node=per_node)
    for case, *results in zip(CASES, *by_rank, strict=True):
        dtype, by_tokens, _, zeroing, name = case
        expected, tolerance = (
            reference(dtype, by_tokens, zeroing, name, world),
            toy.TOLERANCE[dtype],
        )
        close = functools.partial(
            torch.testing.assert_close,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, case=case: f"{case}: {text}",
        )
        for got in results:
            close(got["values"], expected["values"])
            assert all(map(torch.equal, got["values"], results[0]["values"])), case
            close(got["norms"], expected["norms"])
            for mine, whole in zip(got["gradients"], expected["gradients"], strict=True):
                for tensor, gradient in mine.items():
                    start, stop = (n - offsets[tensor] for n in got["places"].get(tensor, (0, 0)))
                    wanted = whole[tensor] if start < stop else None
                    close(gradient, None if wanted is None else wanted.flatten()[start:stop])
        stored = sorted(place for got in results for place in got["places"].values())
        assert [start for start, _ in stored] == [0, *(stop for _, stop in stored[:-1])], case
        assert stored[-1][1] == NUMEL, case


# -- one step -------------------------------------------------------------------------------------


def absent(where: str, zeroing: str) -> dict[str, Any]:
    """The second of two AdamW steps, in which `spare` takes part on some ranks only."""
    (model, replica, optimizer), rank = divided(), own_rank()
    for step in range(2):
        x, y = batch(step, torch.float64)[rank]
        model.losses(x, y, toy.takes_part(where, step, rank)).sum().backward()
        replica.reduce_gradients(len(x))
        norm = replica.clip(toy.MAX_NORM)
        optimizer.step()
        toy.ZEROING[zeroing](replica, optimizer)
    steps = {int(state["step"]) for p, state in optimizer.state.items() if p.numel()}
    return {"values": flat(model), "norm": norm, "steps": steps}


def absent_each(where: str) -> list[dict[str, Any]]:
    return [absent(where, zeroing) for zeroing in toy.ZEROING]


@pytest.mark.parametrize("where", [toy.ALL, toy.SOME, toy.NONE])
@pytest.mark.parametrize("world", [1, 3])
def test_a_tensor_without_gradient_on_some_ranks(pools: Pools, world: int, where: str) -> None:
    """With one nowhere the optimizer passes it by: no decay, no moment, no count. Where it was set
    to zero rather than to None it takes part, as with plain torch.
    """
    by_rank = pools(world).run(absent_each, where)
    for zeroing, *results in zip(toy.ZEROING, *by_rank, strict=True):
        model = Toy(torch.float64)
        optimizer = torch.optim.AdamW(groups(dict(model.named_parameters())))
        for step in range(2):
            optimizer.zero_grad(set_to_none=zeroing != "to zero")
            toy.backward_of_some(model, step, world, where)
            norm = nn.utils.clip_grad_norm_(model.parameters(), toy.MAX_NORM)
            optimizer.step()
        for got in results:
            torch.testing.assert_close(got["values"], flat(model), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(got["norm"], norm, rtol=1e-12, atol=1e-12)
        counts = {int(state["step"]) for state in optimizer.state.values()}
        assert set.union(*(got["steps"] for got in results)) == counts, zeroing


# -- what a rank holds and sends ------------------------------------------------------------------


def one_step() -> dict[str, Any]:
    """A step under a log of collectives, and the bytes of the moments after it."""
    (model, replica), rank = replicated(torch.float32, divided=True), own_rank()
    optimizer = replica.attach_optimizer(torch.optim.AdamW(replica.optimized.values()))
    x, y = batch(0, torch.float32)[rank]
    model.losses(x, y, spare=True).sum().backward()
    replica.wire.take()
    with CollectiveLog() as log:
        replica.reduce_gradients(len(x))
        optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
    strategy = replica.strategy
    return {
        "calls": log.calls,
        "counted": replica.wire.take(),
        "formula": strategy.wire_bytes(replica.named, replica.topology),
        "moments": sum(v.untyped_storage().nbytes() for v in moments),
        "elements": strategy.elements(replica.named, replica.topology),
    }


@pytest.mark.parametrize(("world", "per_node"), SHAPES)
def test_moments_are_divided_and_the_wire_is_not(pools: Pools, world: int, per_node: int) -> None:
    """Each rank has at most ⌈37 / ranks⌉ elements of two moments; the large tensor costs what its
    all-reduce costs, and one small all-reduce goes with it.
    """
    results = pools(world).run(one_step, ranks_per_node=per_node)
    part = -(-NUMEL // world)
    assert sum(result["moments"] for result in results) == 2 * 4 * NUMEL
    small = -(-(4 + 2 + 16 + 2 * world + 1) // world) * world  # presence, tail, Σ g²; padding
    levels = (2 if (world, per_node) == (4, 2) else 1) if world > 1 else 0
    for result in results:
        assert result["moments"] <= 2 * 4 * part and result["elements"] == part
        calls = result["calls"]
        sent = sum(call.sent() for call in calls)
        assert result["counted"] == round(sent) and result["formula"] == sent
        large = calls[:levels] + calls[len(calls) - levels :]
        scalars = calls[levels : len(calls) - levels]
        assert sum(call.sent() for call in large) == 2 * (4 * part * world) * (world - 1) / world
        whole = {1: [4 * part * world], 2: [4 * part * world, 4 * part * 2]}.get(levels, [])
        assert [call.nbytes for call in large] == [*whole, *reversed(whole)]
        assert [call.crosses(per_node) for call in large] == (
            [False, True, True, False] if levels == 2 else [world > per_node] * len(large)
        )
        sizes = [small] if levels == 1 else [small, small / 2, small]
        assert [call.nbytes for call in scalars] == [8 * size for size in sizes if levels]
