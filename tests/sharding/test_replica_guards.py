"""How the replica keeps its promise: one adapter, in its own buffers, the same on every rank."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Pools
from run_training import same_bits
from torch import Tensor, nn
from toy import Toy, batch, moved, own_rank, replicated

from dlora.errors import UsageError
from dlora.sharding.replica.replica import Replica, ReplicaError
from dlora.sharding.topology import Topology

# -- parameters that move --------------------------------------------------------------------------


def moved_each() -> list[dict[str, Tensor]]:
    """SGD with momentum, whose momentum is by parameter."""
    found = []
    for when in ("never", "before backward", "after backward"):
        model, replica = replicated()
        optimizer = torch.optim.SGD(replica.named.values(), lr=0.05, momentum=0.9)
        found.append(moved(model, replica, optimizer, when, spare=False))
        first, last = replica.values.data_ptr(), replica.values.data_ptr() + replica.values.nbytes
        assert all(first <= parameter.data_ptr() < last for parameter in model.parameters())
    return found


def test_moved_parameters_are_bound_again(pools: Pools) -> None:
    for unmoved, *others in pools(2).run(moved_each):
        assert all(same_bits(got, unmoved) for got in others)
        assert torch.equal(unmoved["spare"], Toy(torch.float64).spare)  # never had a gradient


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
def test_cast_adapters_are_refused(to: str, backward: bool) -> None:
    assert cast(to, backward) == (
        f"the adapters were cast from torch.float32 to torch.{to}; cast the base only, "
        "before dlora.attach"
    )


# -- the audit -------------------------------------------------------------------------------------


Flips = dict[int, list[tuple[str, int]]]  # by rank: name, index of the word whose bit flips
FLIPS: dict[int, dict[str, Flips]] = {  # by number of ranks: what is found of them
    2: {
        "": {},
        "A on rank 1": {1: [("A", 14)]},
        "b on rank 1": {0: [("b", 0)]},  # two against each other: rank 0 counts as right
    },
    3: {
        "B on rank 0": {0: [("B", 3)]},
        "A on rank 2; spare on rank 2": {2: [("A", 0), ("spare", 6)]},
        "b on rank 1; B on rank 2": {1: [("b", 4)], 2: [("B", 9)]},
        "b on rank 1, 2": {1: [("b", 4)], 2: [("b", 3)]},
    },
}


def audited(flips: Flips, heal: bool) -> tuple[str, dict[str, Tensor]]:
    """What an audit says of flipped bits, and the tensors after a second one."""
    (model, replica), rank = replicated(torch.float32), own_rank()
    replica.audit()
    lines: list[str] = []
    replica.healed = lines.append if heal else None
    for name, index in flips.get(rank, []):
        model.get_parameter(name).data.view(-1).view(torch.int32)[index] ^= 1
    try:
        replica.audit()
        replica.audit()
    except ReplicaError as error:
        lines.append(str(error))
    return "; ".join(lines), {name: p.detach().clone() for name, p in replica.named.items()}


def audited_each(world: int) -> list[tuple[str, str, dict[str, Tensor]]]:
    return [
        (audited(flips, heal=False)[0], *audited(flips, heal=True))
        for flips in FLIPS[world].values()
    ]


@pytest.mark.parametrize("world", FLIPS)
def test_an_audit_names_or_heals_what_differs(pools: Pools, world: int) -> None:
    """By tensor and rank; it heals by the bits of most ranks, where these are the untouched."""
    untouched = dict(Toy(torch.float32).named_parameters())
    for results in pools(world).run(audited_each, world):
        for (named, flips), (found, healed, tensors) in zip(
            FLIPS[world].items(), results, strict=True
        ):
            prefix = "the adapters are no longer the same on every rank: "
            assert found == (prefix + named if named else "")
            assert healed == named
            flipped = {name for bits in flips.values() for name, _ in bits}
            for name in flipped if "1, 2" in named or 0 in flips and world == 2 else ():
                tensors[name] = untouched[name]  # no majority, or the wrong one
            assert all(torch.equal(tensors[name], untouched[name]) for name in untouched), named


def audited_by_itself() -> dict[str, Any]:
    """A loop that never calls `audit`: bytes of each reduction, and the error after a flip."""
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
