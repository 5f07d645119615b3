"""The replica against ordinary autograd: one process, the union of all ranks' batches.

A rank's batch is its part of the same rows; parts differ in size. The reference is computed here
from torch.autograd, torch.nn.utils.clip_grad_norm_ and torch.optim on whole batches.
"""

from typing import Any

import pytest
import torch
import toy
from ranks import Pools
from torch import Tensor, nn
from toy import Toy, batch, flat, gradients, own_rank, replicated

from dlora.sharding.replica import audit
from dlora.sharding.replica.replica import Replica, ReplicaError
from dlora.sharding.topology import Topology

LR = 0.05
SHAPES = [(1, 1), (2, 2), (3, 3), (4, 4), (4, 2), (4, 1), (3, 2)]  # ranks, ranks per node
# dtype, whether losses are summed over tokens, micro-batches, how gradients are zeroed
CASES = [
    (dtype, *case)
    for dtype in toy.TOLERANCE
    for case in [
        (True, 1, "replica"),
        (True, 3, "to none"),
        (False, 1, "to zero"),
        (False, 2, "to none"),
    ]
]


# -- training -------------------------------------------------------------------------------------


def train(dtype: torch.dtype, by_tokens: bool, pieces: int, zeroing: str) -> dict[str, Any]:
    """Steps with the replica: gradients, norms, values."""
    model, replica = replicated(dtype)
    optimizer = torch.optim.AdamW(replica.named.values(), lr=LR, weight_decay=0.1)
    seen: dict[str, Any] = {"gradients": [], "norms": [], "tokens": []}
    for step in range(toy.STEPS):
        how = {"by_tokens": by_tokens, "pieces": pieces}
        found = toy.reduced(model, replica, step, spare=step > 0, **how)
        seen["gradients"].append(gradients(replica.named))
        seen["norms"].append(replica.clip(toy.MAX_NORM))
        seen["tokens"].append(found.tokens)
        optimizer.step()
        toy.ZEROING[zeroing](replica, optimizer)
    return seen | {"values": replica.values.detach().clone()}


def train_each() -> list[dict[str, Any]]:
    return [train(*case) for case in CASES]


def reference(dtype: torch.dtype, by_tokens: bool, world: int) -> dict[str, Any]:
    """The same steps on all rows at once."""
    model = Toy(dtype)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), lr=LR, weight_decay=0.1)
    seen: dict[str, Any] = {"gradients": [], "norms": [], "tokens": []}
    for step in range(toy.STEPS):
        toy.backward_of_all(model, step, world, spare=step > 0, by_tokens=by_tokens)
        seen["gradients"].append(gradients(named))
        seen["norms"].append(nn.utils.clip_grad_norm_(named.values(), toy.MAX_NORM))
        seen["tokens"].append(sum(toy.ROWS[:world]) if by_tokens else world)
        optimizer.step()
        optimizer.zero_grad()
    return seen | {"values": flat(model)}


@pytest.mark.parametrize(("world", "per_node"), SHAPES)
def test_training_equals_one_process(pools: Pools, world: int, per_node: int) -> None:
    by_rank = pools(world).run(train_each, ranks_per_node=per_node)
    for case, *results in zip(CASES, *by_rank, strict=True):
        expected, tolerance = reference(*case[:2], world), toy.TOLERANCE[case[0]]
        for got in results:
            assert torch.equal(got["values"], results[0]["values"]), case
            torch.testing.assert_close(
                got, expected, rtol=tolerance, atol=tolerance, msg=lambda m, c=case: f"{c}: {m}"
            )


# -- one step -------------------------------------------------------------------------------------


def absent(where: str, zeroing: str) -> dict[str, Any]:
    """The second of two AdamW steps, in which `spare` takes part on some ranks only."""
    (model, replica), rank = replicated(), own_rank()
    optimizer = torch.optim.AdamW(replica.named.values(), lr=LR, weight_decay=0.1)
    for step in range(2):
        x, y = batch(step, torch.float64)[rank]
        before = model.spare.detach().clone()
        model.losses(x, y, toy.takes_part(where, step, rank)).sum().backward()
        replica.reduce_gradients(len(x))
        gradient = None if model.spare.grad is None else model.spare.grad.clone()
        norm = replica.clip(toy.MAX_NORM)
        optimizer.step()
        toy.ZEROING[zeroing](replica, optimizer)
    return {"gradient": gradient, "norm": norm, "moved": not torch.equal(model.spare, before)}


def absent_each(where: str) -> list[dict[str, Any]]:
    return [absent(where, zeroing) for zeroing in ("replica", "to none")]


@pytest.mark.parametrize("where", [toy.ALL, toy.SOME, toy.NONE])
@pytest.mark.parametrize("world", [1, 3])
def test_a_tensor_without_gradient_on_some_ranks(pools: Pools, world: int, where: str) -> None:
    """It counts as zero where others have one; with none anywhere the optimizer passes it by."""
    model = Toy(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)
    for step in range(2):
        optimizer.zero_grad()
        toy.backward_of_some(model, step, world, where)
        wanted = None if model.spare.grad is None else model.spare.grad.clone()
        norm = nn.utils.clip_grad_norm_(model.parameters(), toy.MAX_NORM)
        optimizer.step()
    expected = {"gradient": wanted, "norm": norm, "moved": where != toy.NONE}
    for got in (got for results in pools(world).run(absent_each, where) for got in results):
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


HOW = ["assigned", "added in place", "scaled after backward", "taken away"]


def by_hand_each() -> list[tuple[Tensor | None, Tensor]]:
    return [by_hand(how) for how in HOW]


def test_gradients_set_by_hand(pools: Pools) -> None:
    firsts = [x[0] for x, _ in batch(0, torch.float64)[:2]]
    wanted_a = (sum(firsts) / 2).expand(5, 3)
    for results in pools(2).run(by_hand_each):
        for how, got in zip(HOW, results, strict=True):
            wanted_b = None if how == "taken away" else torch.full((5,), 1.5, dtype=torch.float64)
            torch.testing.assert_close(got, (wanted_b, wanted_a), rtol=1e-12, atol=1e-12)


def reduced_scalars(
    tokens: list[int], scalars: list[dict[str, float]], each: list[int]
) -> tuple[Any, ...]:
    (model, replica), rank = replicated(torch.float32), own_rank()
    (model.A * tokens[rank]).sum().backward()
    reduced = replica.reduce_gradients(tokens[rank], scalars=scalars[rank], each=each[rank])
    return reduced.tokens, reduced.scalars, reduced.each, model.A.grad.unique().tolist()


@pytest.mark.parametrize("per_node", [3, 1])
@pytest.mark.parametrize(
    ("tokens", "each"),
    [
        ([3, 0, 5], [0, 7, 4096]),
        ([2**24 + 1, 2**24 + 3, 2**30 + 5], [2**24 + 1, 2**48 - 1, 2**36 + 3]),
    ],
)
def test_scalars_are_reduced_with_the_gradients(
    pools: Pools, per_node: int, tokens: list[int], each: list[int]
) -> None:
    """By name; integers arrive exactly where float32 has no more room for them."""
    scalars = [{f"s{slot}": 1.5 * rank + slot for slot in range(16)} for rank in range(3)]
    wanted = {name: sum(one[name] for one in scalars) for name in scalars[0]}
    for got in pools(3).run(reduced_scalars, tokens, scalars, each, ranks_per_node=per_node):
        assert got == (sum(tokens), wanted, each, [1.0])


def test_too_many_scalars_are_refused() -> None:
    _, replica = replicated()
    with pytest.raises(ReplicaError, match="17 scalars do not fit the 16 slots"):
        replica.reduce_gradients(scalars=dict.fromkeys(map(str, range(17)), 0.0))


def clipped_twice(dtype: torch.dtype, scale: float) -> list[torch.Tensor]:
    """Values of one gradient after `clip` by itself, and after `clip` with the reduced norm."""
    results = []
    for known in (False, True):
        replica = Replica(Topology.current())
        replica.own({"a": nn.Parameter(torch.zeros(1000, dtype=dtype))})
        replica.named["a"].grad = scale * torch.randn(
            1000, dtype=dtype, generator=torch.Generator().manual_seed(own_rank())
        )
        reduced = replica.reduce_gradients()
        wanted = torch.linalg.vector_norm(replica.gradients.double())
        assert reduced.norm == pytest.approx(float(wanted), rel=1e-6)
        replica.clip(0.7, reduced.norm) if known else replica.clip(0.7)
        results.append(replica.gradients.clone())
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_norm_that_is_known_clips_to_the_same_bits(pools: Pools, dtype: torch.dtype) -> None:
    for scale in (1e-3, 1.0, 123.4):
        for by_itself, by_norm in pools(2).run(clipped_twice, dtype, scale):
            assert torch.equal(by_itself, by_norm)


@pytest.mark.parametrize("numel", [1, 5, 12, 13])
def test_a_checksum_in_blocks_is_that_of_the_whole(
    numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "_BLOCK", 4)
    tensor = torch.randn(numel)
    words = [int(word) for word in tensor.view(torch.int32)]
    wanted = sum(word * (2 * place + 1) for place, word in enumerate(words))
    assert int(audit._checksum(tensor)) % 2**64 == wanted % 2**64
