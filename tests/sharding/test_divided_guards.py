"""How a divided optimizer state keeps the replica's promise, and what is refused."""

import re
from typing import Any

import pytest
import torch
from ranks import Pools
from run_training import same_bits
from torch import Tensor
from toy import batch, divided, flat, moved, own_rank, replicated

from dlora import UsageError, shard
from dlora.sharding.replica.optimizer_state import states_of
from dlora.sharding.replica.replica import ReplicaError


def moved_each() -> list[dict[str, Tensor]]:
    found = []
    for when in ("never", "before backward", "after backward", "before the step"):
        model, replica, optimizer = divided()
        found.append(moved(model, replica, optimizer, when, spare=False))
        assert torch.equal(flat(model), replica.values)
    return found


def test_moved_parameters_are_bound_again(pools: Pools) -> None:
    for unmoved, *others in pools(2).run(moved_each):
        assert all(same_bits(got, unmoved) for got in others)


def flipped() -> str:
    """What the audit says once a bit flipped on a rank that does not step it."""
    (model, replica, optimizer), rank = divided(dtype=torch.float32), own_rank()
    x, y = batch(0, torch.float32)[rank]
    model.losses(x, y, spare=True).sum().backward()
    replica.reduce_gradients(len(x))
    optimizer.step()
    replica.audit()
    if rank == 1:
        model.A.data.view(torch.int32)[0, 0] ^= 1
    with pytest.raises(ReplicaError) as stopped:
        replica.audit()
    return str(stopped.value)


def test_the_audit_sees_whole_tensors(pools: Pools) -> None:
    told = "the adapters are no longer the same on every rank: A on rank 1"
    assert pools(3).run(flipped) == [told] * 3


# -- what is refused ------------------------------------------------------------------------------


class Norms(torch.optim.SGD):
    """An optimizer with a state that does not go with single elements."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["norms"] = torch.zeros(2, 3)


def refused(case: str) -> str:
    (model, replica), rank = replicated(divided=True), own_rank()
    x, y = batch(0, torch.float64)[rank]
    model.losses(x, y, spare=True).sum().backward()
    try:
        if case == "whole tensors":
            replica.attach_optimizer(torch.optim.SGD(model.parameters()))
        if case == "not attached":
            torch.optim.SGD(replica.optimized.values())
            replica.reduce_gradients()
        optimizer = replica.attach_optimizer(Norms(replica.optimized.values()))
        replica.reduce_gradients()
        optimizer.step()
        list(replica.strategy.gather_full(states_of(optimizer, replica.optimized)))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


REFUSED = {
    "not attached": "ReplicaError: the optimizer state is divided over ranks, and its steps .*",
    "whole tensors": r"ReplicaError: .*; give it replica\.parameter_groups\(\.\.\.\)",
    "shapes": r"UsageError: sharding\.optimizer_state: .* this one has norms of shape \[2, 3\] .*",
}


def refused_each() -> list[str]:
    return [refused(case) for case in REFUSED]


def test_what_would_go_wrong_is_refused_on_every_rank(pools: Pools) -> None:
    for told in pools(2).run(refused_each):
        for message, line in zip(REFUSED.values(), told, strict=True):
            assert re.fullmatch(message, line, re.DOTALL), line


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(UsageError, match="sharding.optimizer_state: expected one of auto, "):
        shard(torch.nn.Linear(2, 2), optimizer_state="half")
