"""The replica against ordinary autograd: one process, the union of all ranks' batches.

A rank's batch is its part of the same rows; parts differ in size. The reference is computed here
from torch.autograd, torch.nn.utils.clip_grad_norm_ and torch.optim on whole batches.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import Pools
from torch import Tensor, nn
from toy import ROWS, Toy, batch, own_rank, replicated

from dlora.sharding.replica.replica import Replica

STEPS, MAX_NORM, LR = 3, 0.5, 0.05
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SHAPES = [(1, 1), (2, 2), (3, 3), (4, 4), (4, 2), (4, 1), (3, 2)]  # ranks, ranks per node

Zero = Callable[[Replica, torch.optim.Optimizer], None]
ZEROING: dict[str, Zero] = {
    "replica": lambda replica, optimizer: replica.zero_grad(),
    "to none": lambda replica, optimizer: optimizer.zero_grad(set_to_none=True),
    "to zero": lambda replica, optimizer: optimizer.zero_grad(set_to_none=False),
}


# -- training -------------------------------------------------------------------------------------


def train(dtype: torch.dtype, by_tokens: bool, pieces: int, zeroing: str) -> dict[str, Any]:
    """Steps with the replica: gradients, norms, values."""
    (model, replica), rank = replicated(dtype), own_rank()
    optimizer = torch.optim.AdamW(replica.named.values(), lr=LR, weight_decay=0.1)
    seen: dict[str, Any] = {"gradients": [], "norms": [], "tokens": []}
    for step in range(STEPS):
        x, y = batch(step, dtype)[rank]
        for some_x, some_y in zip(x.tensor_split(pieces), y.tensor_split(pieces), strict=True):
            loss = model.losses(some_x, some_y, spare=step > 0).sum()
            (loss if by_tokens else loss / len(x)).backward()
        reduced = replica.reduce_gradients(**({"tokens": len(x)} if by_tokens else {}))
        gradients = {
            n: None if p.grad is None else p.grad.clone() for n, p in replica.named.items()
        }
        seen["gradients"].append(gradients)
        seen["norms"].append(replica.clip(MAX_NORM))
        seen["tokens"].append(reduced.tokens)
        optimizer.step()
        ZEROING[zeroing](replica, optimizer)
    return seen | {"values": replica.values.detach().clone()}


def reference(dtype: torch.dtype, by_tokens: bool, world: int) -> dict[str, Any]:
    """The same steps on all rows at once."""
    model = Toy(dtype)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), lr=LR, weight_decay=0.1)
    seen: dict[str, Any] = {"gradients": [], "norms": [], "tokens": []}
    for step in range(STEPS):
        parts = [model.losses(x, y, spare=step > 0) for x, y in batch(step, dtype)[:world]]
        mean = (
            torch.cat(parts).mean() if by_tokens else torch.stack([p.mean() for p in parts]).mean()
        )
        mean.backward()
        gradients = {n: None if p.grad is None else p.grad.clone() for n, p in named.items()}
        seen["gradients"].append(gradients)
        seen["norms"].append(nn.utils.clip_grad_norm_(named.values(), MAX_NORM))
        seen["tokens"].append(sum(ROWS[:world]) if by_tokens else world)
        optimizer.step()
        optimizer.zero_grad()
    return seen | {"values": torch.cat([p.detach().flatten() for p in named.values()])}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("world", "per_node"), SHAPES)
@pytest.mark.parametrize(
    ("by_tokens", "pieces", "zeroing"),
    [(True, 1, "replica"), (True, 3, "to none"), (False, 1, "to zero"), (False, 2, "to none")],
)
def test_training_equals_one_process(
    pools: Pools,
    dtype: torch.dtype,
    world: int,
    per_node: int,
    by_tokens: bool,
    pieces: int,
    zeroing: str,
) -> None:
    results = pools(world).run(train, dtype, by_tokens, pieces, zeroing, ranks_per_node=per_node)
    expected, tolerance = reference(dtype, by_tokens, world), TOLERANCE[dtype]
    for got in results:
        assert torch.equal(got["values"], results[0]["values"])
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# -- one step -------------------------------------------------------------------------------------

ALL, SOME, NONE = "on all ranks", "on rank 0 only", "on no rank"


def absent(where: str, zeroing: str) -> dict[str, Any]:
    """The second of two AdamW steps, in which `spare` takes part on some ranks only."""
    (model, replica), rank = replicated(), own_rank()
    optimizer = torch.optim.AdamW(replica.named.values(), lr=LR, weight_decay=0.1)
    for step in range(2):
        x, y = batch(step, torch.float64)[rank]
        before = model.spare.detach().clone()
        takes_part = step == 0 or where == ALL or (where == SOME and rank == 0)
        model.losses(x, y, takes_part).sum().backward()
        replica.reduce_gradients(len(x))
        gradient = None if model.spare.grad is None else model.spare.grad.clone()
        norm = replica.clip(MAX_NORM)
        optimizer.step()
        ZEROING[zeroing](replica, optimizer)
    return {"gradient": gradient, "norm": norm, "moved": not torch.equal(model.spare, before)}


@pytest.mark.parametrize("zeroing", ["replica", "to none"])
@pytest.mark.parametrize("where", [ALL, SOME, NONE])
@pytest.mark.parametrize("world", [1, 3])
def test_a_tensor_without_gradient_on_some_ranks(
    pools: Pools, world: int, where: str, zeroing: str
) -> None:
    """It counts as zero where others have one; with none anywhere the optimizer passes it by."""
    model = Toy(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)
    for step in range(2):
        optimizer.zero_grad()
        for rank, (x, y) in enumerate(batch(step, torch.float64)[:world]):
            takes_part = step == 0 or where == ALL or (where == SOME and rank == 0)
            (model.losses(x, y, takes_part).sum() / sum(ROWS[:world])).backward()
        wanted = None if model.spare.grad is None else model.spare.grad.clone()
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
    for got in pools(world).run(absent, where, zeroing):
        expected = {"gradient": wanted, "norm": norm, "moved": where != NONE}
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def by_hand(how: str) -> tuple[Tensor | None, Tensor]:
    """Gradients of `b` that no backward pass made, and those of `A`, which one did."""
    (model, replica), rank = replicated(), own_rank()
    replica.zero_grad()
    x, y = batch(0, torch.float64)[rank]
    (model.A @ x[0]).sum().backward()
    mine = torch.full((5,), 1.0 + rank, dtype=torch.float64)
    if how == "assigned":
        model.b.grad = mine
    elif how == "added in place":
        model.b.grad.add_(mine)
    elif how == "scaled after backward":
        model.b.grad = mine / 2
        model.b.grad.mul_(2)
        model.A.grad.mul_(1.0)
    elif how == "taken away":
        (model.b * mine).sum().backward()
        model.b.grad = None
    replica.reduce_gradients()
    return None if model.b.grad is None else model.b.grad.clone(), model.A.grad.clone()


@pytest.mark.parametrize(
    "how", ["assigned", "added in place", "scaled after backward", "taken away"]
)
def test_gradients_set_by_hand(pools: Pools, how: str) -> None:
    firsts = [x[0] for x, _ in batch(0, torch.float64)[:2]]
    wanted_a = (sum(firsts) / 2).expand(5, 3)
    wanted_b = None if how == "taken away" else torch.full((5,), 1.5, dtype=torch.float64)
    for got in pools(2).run(by_hand, how):
        torch.testing.assert_close(got, (wanted_b, wanted_a), rtol=1e-12, atol=1e-12)


def travel(tokens: list[int], sums: list[list[float]], each: list[int]) -> tuple[Any, ...]:
    (model, replica), rank = replicated(torch.float32), own_rank()
    (model.A * tokens[rank]).sum().backward()
    reduced = replica.reduce_gradients(tokens[rank], sums=sums[rank], each=each[rank])
    return reduced.tokens, reduced.sums, reduced.each, model.A.grad.unique().tolist()


@pytest.mark.parametrize("per_node", [3, 1])
@pytest.mark.parametrize(
    ("tokens", "each"),
    [
        ([3, 0, 5], [0, 7, 4096]),
        ([2**24 + 1, 2**24 + 3, 2**30 + 5], [2**24 + 1, 2**36 - 1, 2**31 + 3]),
    ],
)
def test_scalars_travel_with_the_gradients(
    pools: Pools, per_node: int, tokens: list[int], each: list[int]
) -> None:
    """Integers arrive exactly where float32 has no more room for them."""
    sums = [[1.5 * rank + slot for slot in range(16)] for rank in range(3)]
    wanted = [sum(column) for column in zip(*sums, strict=True)]
    for got in pools(3).run(travel, tokens, sums, each, ranks_per_node=per_node):
        assert got == (sum(tokens), wanted, each, [1.0])


def overfill() -> None:
    _, replica = replicated()
    replica.reduce_gradients(sums=[0.0] * 17)


def test_too_many_scalars_are_refused(pools: Pools) -> None:
    with pytest.raises(AssertionError, match="17 scalars do not fit the 16 slots"):
        pools(1).run(overfill)
