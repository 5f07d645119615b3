"""A divided optimizer state against ordinary autograd and torch.optim, on whole tensors, in one
process; and what a rank holds and sends of it.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from collectives import CollectiveLog
from ranks import Pools
from test_replica import ALL, MAX_NORM, NONE, SOME, STEPS, TOLERANCE, ZEROING
from torch import Tensor, nn
from toy import ROWS, Toy, batch, own_rank, replicated

from dlora.sharding.replica.replica import Replica

SHAPES = [(1, 1), (2, 2), (3, 3), (4, 2), (4, 1), (3, 2)]  # ranks, ranks per node
NUMEL = 37
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "fused AdamW": functools.partial(torch.optim.AdamW, fused=True),
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
}


def groups(named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Two rates, two decays."""
    return [
        {"params": [named["A"], named["spare"]], "lr": 0.05, "weight_decay": 0.1},
        {"params": [named["b"], named["B"]], "lr": 0.2, "weight_decay": 0.0},
    ]


def divided(
    optimizer: str = "AdamW", dtype: torch.dtype = torch.float64
) -> tuple[Toy, Replica, torch.optim.Optimizer]:
    model, replica = replicated(dtype, divided=True)
    return model, replica, replica.drive(OPTIMIZERS[optimizer](groups(replica.optimized)))


def gradients(named: dict[str, nn.Parameter]) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in named.items()}


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def places(replica: Replica) -> dict[str, tuple[int, int]]:
    """Where the parts lie in the flat values, by their addresses."""
    first, size = replica.values.data_ptr(), replica.values.element_size()
    starts = {n: (p.data_ptr() - first) // size for n, p in replica.optimized.items() if len(p)}
    return {n: (start, start + len(replica.optimized[n])) for n, start in starts.items()}


# -- training -------------------------------------------------------------------------------------


def train(
    dtype: torch.dtype, by_tokens: bool, pieces: int, zeroing: str, name: str
) -> dict[str, Any]:
    (model, replica, optimizer), rank = divided(name, dtype), own_rank()
    seen: dict[str, Any] = {"gradients": [], "norms": [], "values": []}
    for step in range(STEPS):
        x, y = batch(step, dtype)[rank]
        for some_x, some_y in zip(x.tensor_split(pieces), y.tensor_split(pieces), strict=True):
            loss = model.losses(some_x, some_y, spare=step == 1).sum()
            (loss if by_tokens else loss / len(x)).backward()
        replica.reduce_gradients(**({"tokens": len(x)} if by_tokens else {}))
        assert all(parameter.grad is None for parameter in model.parameters())
        seen["gradients"].append(gradients(replica.optimized))
        seen["norms"].append(replica.clip(MAX_NORM))
        assert replica.gradient_norm() < 1.0001 * MAX_NORM
        optimizer.step()
        seen["values"].append(flat(model))
        ZEROING[zeroing](replica, optimizer)
    replica.audit()
    return seen | {"places": places(replica)}


def reference(
    dtype: torch.dtype, by_tokens: bool, zeroing: str, name: str, world: int
) -> dict[str, Any]:
    """The same steps on all rows at once."""
    model = Toy(dtype)
    named = dict(model.named_parameters())
    optimizer = OPTIMIZERS[name](groups(named))
    seen: dict[str, Any] = {"gradients": [], "norms": [], "values": []}
    for step in range(STEPS):
        parts = [model.losses(x, y, spare=step == 1) for x, y in batch(step, dtype)[:world]]
        means = torch.stack([part.mean() for part in parts])
        (torch.cat(parts).mean() if by_tokens else means.mean()).backward()
        seen["gradients"].append(gradients(named))
        seen["norms"].append(nn.utils.clip_grad_norm_(named.values(), MAX_NORM))
        optimizer.step()
        seen["values"].append(flat(model))
        optimizer.zero_grad(set_to_none=zeroing != "to zero")
    return seen


@pytest.mark.parametrize(("world", "per_node"), SHAPES)
@pytest.mark.parametrize(
    ("dtype", "by_tokens", "pieces", "zeroing", "name"),
    [
        (torch.float64, True, 1, "replica", "AdamW"),
        (torch.float32, True, 3, "to none", "fused AdamW"),
        (torch.float64, False, 2, "to zero", "AdamW"),
        (torch.float64, False, 2, "to none", "SGD"),
    ],
)
def test_training_equals_one_process(
    pools: Pools,
    world: int,
    per_node: int,
    dtype: torch.dtype,
    by_tokens: bool,
    pieces: int,
    zeroing: str,
    name: str,
) -> None:
    arguments = (dtype, by_tokens, pieces, zeroing, name)
    results = pools(world).run(train, *arguments, ranks_per_node=per_node)
    expected, tolerance = reference(dtype, by_tokens, zeroing, name, world), TOLERANCE[dtype]
    close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    offsets = {"A": 0, "b": 15, "B": 20, "spare": 30}
    for got in results:
        close(got["values"], expected["values"])
        assert all(map(torch.equal, got["values"], results[0]["values"]))
        close(got["norms"], expected["norms"])
        for mine, whole in zip(got["gradients"], expected["gradients"], strict=True):
            for tensor, gradient in mine.items():
                start, stop = (n - offsets[tensor] for n in got["places"].get(tensor, (0, 0)))
                wanted = whole[tensor] if start < stop else None
                close(gradient, None if wanted is None else wanted.flatten()[start:stop])
    held = sorted(place for got in results for place in got["places"].values())
    assert [start for start, _ in held] == [0, *(stop for _, stop in held[:-1])]
    assert held[-1][1] == NUMEL


# -- one step -------------------------------------------------------------------------------------


def absent(where: str, zeroing: str) -> dict[str, Any]:
    """The second of two AdamW steps, in which `spare` takes part on some ranks only."""
    (model, replica, optimizer), rank = divided(), own_rank()
    for step in range(2):
        x, y = batch(step, torch.float64)[rank]
        takes_part = step == 0 or where == ALL or (where == SOME and rank == 0)
        model.losses(x, y, takes_part).sum().backward()
        replica.reduce_gradients(len(x))
        norm = replica.clip(MAX_NORM)
        optimizer.step()
        ZEROING[zeroing](replica, optimizer)
    steps = {int(state["step"]) for p, state in optimizer.state.items() if p.numel()}
    return {"values": flat(model), "norm": norm, "steps": steps}


@pytest.mark.parametrize("zeroing", ZEROING)
@pytest.mark.parametrize("where", [ALL, SOME, NONE])
@pytest.mark.parametrize("world", [1, 3])
def test_a_tensor_without_gradient_on_some_ranks(
    pools: Pools, world: int, where: str, zeroing: str
) -> None:
    """With one nowhere the optimizer passes it by: no decay, no moment, no count. Where it was set
    to zero rather than to None it takes part, as with plain torch.
    """
    model = Toy(torch.float64)
    optimizer = torch.optim.AdamW(groups(dict(model.named_parameters())))
    for step in range(2):
        optimizer.zero_grad(set_to_none=zeroing != "to zero")
        for rank, (x, y) in enumerate(batch(step, torch.float64)[:world]):
            takes_part = step == 0 or where == ALL or (where == SOME and rank == 0)
            (model.losses(x, y, takes_part).sum() / sum(ROWS[:world])).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
    counts = {int(state["step"]) for state in optimizer.state.values()}
    results = pools(world).run(absent, where, zeroing)
    for got in results:
        torch.testing.assert_close(got["values"], flat(model), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got["norm"], norm, rtol=1e-12, atol=1e-12)
    assert set.union(*(got["steps"] for got in results)) == counts


# -- what a rank holds and sends ------------------------------------------------------------------


def one_step() -> dict[str, Any]:
    """A step under a log of collectives, and the bytes of the moments after it."""
    (model, replica), rank = replicated(torch.float32, divided=True), own_rank()
    optimizer = replica.drive(torch.optim.AdamW(replica.optimized.values()))
    x, y = batch(0, torch.float32)[rank]
    model.losses(x, y, spare=True).sum().backward()
    replica.wire.take()
    with CollectiveLog() as log:
        replica.reduce_gradients(len(x))
        optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
    share = replica.share
    return {
        "calls": log.calls,
        "counted": replica.wire.take(),
        "formula": share.wire_bytes(replica.named, replica.topology),
        "moments": sum(v.untyped_storage().nbytes() for v in moments),
        "elements": share.elements(replica.named, replica.topology),
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
