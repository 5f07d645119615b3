"""How the replica keeps its promise: one adapter, in its own buffers, the same on every rank."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Pools
from torch import Tensor, nn
from toy import Toy, batch, own_rank, replicated

from dlora.errors import UsageError
from dlora.sharding.replica.replica import Replica, ReplicaError
from dlora.sharding.topology import Topology

LR = 0.05

# -- parameters that move --------------------------------------------------------------------------


def moved(when: str) -> dict[str, Tensor]:
    """Two steps of SGD with momentum; in between all tensors move, as `.to(device)` moves them."""
    (model, replica), rank = replicated(), own_rank()
    optimizer = torch.optim.SGD(replica.named.values(), lr=LR, momentum=0.9)
    for step in range(3):
        replica.zero_grad()
        if step == 1 and when == "before backward":
            model._apply(torch.clone)
        x, y = batch(step, torch.float64)[rank]
        model.losses(x, y, spare=False).sum().backward()
        if step == 1 and when == "after backward":
            model._apply(torch.clone)
        replica.reduce_gradients(len(x))
        optimizer.step()
    replica.audit()
    views = [p.data_ptr() for p in model.parameters()]
    first = replica.values.data_ptr()
    assert all(first <= view < first + replica.values.nbytes for view in views)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("when", ["before backward", "after backward"])
def test_moved_parameters_are_bound_again(pools: Pools, when: str) -> None:
    unmoved, others = pools(2).run(moved, "never"), pools(2).run(moved, when)
    for got in others:
        torch.testing.assert_close(got, unmoved[0], rtol=0, atol=0)
    assert torch.equal(others[0]["spare"], Toy(torch.float64).spare)  # never had a gradient


CASTS = {"float64": torch.float64, "bfloat16": torch.bfloat16}


def cast(to: str, backward: bool) -> str:
    model, replica = replicated(torch.float32)
    model.to(CASTS[to])
    try:
        if backward:
            x, y = batch(0, CASTS[to])[0]
            model.losses(x, y, spare=False).sum().backward()
        replica.reduce_gradients()
    except ReplicaError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("to", CASTS)
def test_cast_adapters_are_refused(pools: Pools, to: str, backward: bool) -> None:
    [message] = pools(1).run(cast, to, backward)
    assert message == (
        f"the adapters were cast from torch.float32 to torch.{to}; cast the base only, "
        "before dlora.attach"
    )


# -- the audit -------------------------------------------------------------------------------------


def flipped(flips: dict[int, list[tuple[str, int]]]) -> str:
    """What the audit says after single bits of some ranks' tensors flipped."""
    (model, replica), rank = replicated(torch.float32), own_rank()
    replica.audit()
    for name, index in flips.get(rank, []):
        bits = model.get_parameter(name).data.view(-1).view(torch.int32)
        bits[index] ^= 1
    try:
        replica.audit()
    except ReplicaError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("world", "flips", "named"),
    [
        (2, {}, None),
        (2, {1: [("A", 14)]}, "A on rank 1"),
        (2, {0: [("b", 0)]}, "b on rank 1"),  # two against each other: rank 0 counts as right
        (3, {0: [("B", 3)]}, "B on rank 0"),
        (3, {2: [("A", 0), ("spare", 6)]}, "A on rank 2; spare on rank 2"),
        (3, {1: [("b", 4)], 2: [("B", 9)]}, "b on rank 1; B on rank 2"),
        (3, {1: [("b", 4)], 2: [("b", 3)]}, "b on rank 1, 2"),
    ],
)
def test_the_audit_names_tensor_and_rank(
    pools: Pools, world: int, flips: dict[int, list[tuple[str, int]]], named: str | None
) -> None:
    expected = f"the adapters are no longer the same on every rank: {named}" if named else ""
    assert pools(world).run(flipped, flips) == [expected] * world


def healing(flips: dict[int, list[tuple[str, int]]]) -> tuple[list[str], dict[str, torch.Tensor]]:
    """What is told of flipped bits, and the tensors afterwards."""
    (model, replica), rank = replicated(torch.float32), own_rank()
    told: list[str] = []
    replica.healed = told.append
    for name, index in flips.get(rank, []):
        model.get_parameter(name).data.view(-1).view(torch.int32)[index] ^= 1
    replica.audit()
    replica.audit()
    return told, {name: p.detach().clone() for name, p in replica.named.items()}


@pytest.mark.parametrize(
    ("world", "flips", "named"),
    [
        (2, {1: [("A", 14)]}, "A on rank 1"),
        (3, {0: [("B", 3)]}, "B on rank 0"),
        (3, {1: [("b", 4)], 2: [("B", 9)]}, "b on rank 1; B on rank 2"),
    ],
)
def test_the_audit_heals_by_the_bits_of_most_ranks(
    pools: Pools, world: int, flips: dict[int, list[tuple[str, int]]], named: str
) -> None:
    [(_, untouched), *_] = pools(world).run(healing, {})
    for told, tensors in pools(world).run(healing, flips):
        assert told == [named]
        for name, tensor in tensors.items():
            assert torch.equal(tensor, untouched[name]), name


def audited_by_itself() -> dict[str, Any]:
    """A loop that never calls `audit`: bytes of each reduction, and what was said of a flip."""
    (model, replica), rank = replicated(torch.float32), own_rank()
    x, y = batch(0, torch.float32)[rank]
    sent: list[int] = []
    try:
        while len(sent) < 30:
            if len(sent) == 12 and rank == 1:
                model.get_parameter("A").data.view(-1).view(torch.int32)[3] ^= 1
            replica.zero_grad()
            model.losses(x, y, spare=False).sum().backward()
            replica.wire.take()
            replica.reduce_gradients(len(x))
            sent.append(replica.wire.take())
    except ReplicaError as error:
        return {"sent": sent, "said": str(error)}
    return {"sent": sent, "said": ""}


def test_every_tenth_reduction_audits(pools: Pools) -> None:
    for result in pools(2).run(audited_by_itself):
        assert result["said"].endswith("A on rank 1")
        plain = result["sent"][0]
        audited = plain + 8  # a checksum of 8 bytes to one other rank
        assert result["sent"] == [*[plain] * 9, audited, *[plain] * 9]


# -- numbers of tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [4, torch.tensor(4), torch.tensor([4]), np.int64(4), 4.0])
def test_any_whole_number_counts_tokens(tokens: Any) -> None:
    model, replica = replicated()
    x, y = batch(0, torch.float64)[0]
    model.losses(x, y, spare=False).sum().backward()
    gradient = model.get_parameter("A").grad.clone()
    assert replica.reduce_gradients(tokens=tokens).tokens == 4
    assert torch.equal(model.get_parameter("A").grad, gradient / 4)


@pytest.mark.parametrize(
    "tokens", [2.5, -1, math.nan, torch.tensor([1, 2]), torch.tensor(0.5), "n"]
)
def test_what_is_no_number_of_tokens_is_refused(tokens: Any) -> None:
    _, replica = replicated()
    with pytest.raises(UsageError, match="^tokens: must be "):
        replica.reduce_gradients(tokens=tokens)


def test_nothing_to_clip() -> None:
    with pytest.raises(ReplicaError, match="nothing to clip: attach adapters first"):
        Replica(Topology.current()).clip(1.0)


def drawn_by_rank() -> Tensor:
    """Parameters that every rank drew for itself, after the replica took them over."""
    model = nn.Linear(3, 2)
    Replica(Topology.current()).own(dict(model.named_parameters()))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_rank_0_decides_the_first_values(pools: Pools) -> None:
    results = pools(3).run(drawn_by_rank)
    assert all(torch.equal(values, results[0]) for values in results)
    assert results[0].unique().numel() == 8
