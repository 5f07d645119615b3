"""Parameters that are cut in the middle of training, against torch.index_select and torch.optim on
a plain model in one process.
"""

import functools
from typing import Any

import pytest
import torch
from ranks import Pools
from sampling import full
from torch import Tensor, nn
from toy import OPTIMIZERS, Toy, batch, own_rank, replicated

from dlora.sharding.replica.replica import Replica, ReplicaError

BEFORE, AFTER = 3, 3  # steps before and after the cut
SHAPES = [  # ranks, ranks per node
    (1, 1),
    full(2, 2),
    (3, 3),
    full(4, 2),
]
# The toy is 3 → 5 → 2: each hidden unit is a row of A, an element of b and a column of B.
UNITS = {
    "some": {"A": (0, [0, 3, 4]), "b": (0, [0, 3, 4]), "B": (1, [0, 3, 4])},
    "none": {"A": (0, []), "b": (0, []), "B": (1, [])},
    "one, and all of spare": {"A": (0, [2]), "b": (0, [2]), "B": (1, [2]), "spare": (0, [])},
    "all of B": {"B": (1, [0, 1, 2, 3, 4])},
}
SETTINGS = {"lr": 0.05, "weight_decay": 0.1}


def cuts(which: str) -> dict[str, tuple[int, Tensor]]:
    chosen = UNITS[which].items()
    return {name: (dim, torch.tensor(stay, dtype=torch.int64)) for name, (dim, stay) in chosen}


def spare_in(step: int) -> bool:
    """Whether the spare vector takes part: once before the cut, so that its state exists."""
    return step == 1


def train(name: str, divided: bool, which: str) -> dict[str, Any]:
    """Steps, a cut, and steps while the last loss of those before it is still alive."""
    (model, replica), rank = replicated(divided=divided), own_rank()
    optimizer = replica.attach_optimizer(OPTIMIZERS[name](replica.optimized.values(), **SETTINGS))
    before = {n: id(p) for n, p in model.named_parameters()}
    seen: dict[str, Any] = {"values": [], "norms": []}

    def step(number: int) -> Tensor:
        x, y = batch(number, torch.float64)[rank]
        loss = model.losses(x, y, spare_in(number)).sum()
        loss.backward(retain_graph=True)
        replica.reduce_gradients(len(x))
        seen["norms"].append(replica.clip(0.5))
        optimizer.step()
        replica.zero_grad()
        seen["values"].append({n: p.detach().clone() for n, p in model.named_parameters()})
        return loss

    for number in range(BEFORE):
        old = step(number)
    replica.resize(cuts(which), optimizer)
    seen["cut"] = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert all(p.grad is None for p in (*model.parameters(), *replica.optimized.values()))
    for number in range(BEFORE, BEFORE + AFTER):
        step(number)
    assert old.requires_grad and old.grad_fn is not None
    assert {n: id(p) for n, p in model.named_parameters()} == before
    assert replica.numel == sum(p.numel() for p in model.parameters()) == len(replica.values)
    replica.audit()
    states = optimizer.state.values()
    held = sum(value.numel() for slots in states for value in slots.values() if value.ndim)
    return seen | {"held": held, "states": whole_states(replica, optimizer)}


def whole_states(replica: Replica, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state of whole tensors, on every rank."""
    states = {n: optimizer.state.get(p, {}) for n, p in replica.optimized.items()}
    whole = replica.strategy.gather_full(states, everywhere=True)
    return {f"{name}.{slot}": value.clone() for name, slot, value in whole}


def reference(name: str, which: str, world: int) -> dict[str, Any]:
    """The same on all rows at once; the cut makes new parameters, and an optimizer with the state
    of the old one.
    """
    model = Toy(torch.float64)
    optimizer = OPTIMIZERS[name](model.parameters(), **SETTINGS)
    seen: dict[str, Any] = {"values": [], "norms": []}
    for number in range(BEFORE + AFTER):
        if number == BEFORE:
            model, optimizer = cut(model, optimizer, name, which)
            seen["cut"] = {n: p.detach().clone() for n, p in model.named_parameters()}
        rows = batch(number, torch.float64)[:world]
        losses = [model.losses(x, y, spare_in(number)) for x, y in rows]
        torch.cat(losses).mean().backward()
        seen["norms"].append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
        optimizer.zero_grad()
        seen["values"].append({n: p.detach().clone() for n, p in model.named_parameters()})
    states = {n: optimizer.state.get(p, {}) for n, p in model.named_parameters()}
    return seen | {
        "states": {
            f"{n}.{slot}": value
            for n, slots in states.items()
            for slot, value in slots.items()
            if isinstance(value, Tensor)
        }
    }


def cut(model: Toy, optimizer: Any, name: str, which: str) -> tuple[Toy, Any]:
    selected = Toy(torch.float64)
    keeps = cuts(which)
    for n, parameter in model.named_parameters():
        value = parameter.detach()
        smaller = torch.index_select(value, *keeps[n]) if n in keeps else value
        setattr(selected, n, nn.Parameter(smaller.clone()))
    fresh = OPTIMIZERS[name](selected.parameters(), **SETTINGS)
    for n, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                is_whole = value.ndim > 0 and n in keeps
                kept = torch.index_select(value, *keeps[n]) if is_whole else value
                fresh.state[selected.get_parameter(n)][slot] = kept.clone()
    return selected, fresh


CASES = [
    ("AdamW", "some"),
    ("fused AdamW", "one, and all of spare"),
    ("AdamW", "none"),
    ("SGD", "some"),
    ("AdamW", "all of B"),
]


def train_each(divided: bool) -> list[dict[str, Any]]:
    return [train(name, divided, which) for name, which in CASES]


@pytest.mark.parametrize(("world", "per_node"), SHAPES)
@pytest.mark.parametrize("divided", [False, True], ids=["whole", "divided"])
def test_training_goes_on_with_what_is_left(
    pools: Pools, world: int, per_node: int, divided: bool
) -> None:
    close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    by_rank = pools(world).run(train_each, divided, ranks_per_node=per_node)
    for case, *results in zip(CASES, *by_rank, strict=True):
        wanted = reference(*case, world)
        for got in results:
            assert torch.equal(torch.stack(got["norms"]), torch.stack(results[0]["norms"])), case
            for key in ("values", "norms", "cut"):
                close(got[key], wanted[key], msg=lambda text, case=case: f"{case}: {text}")
            # Of a tensor that has become empty, no rank with a divided state stores anything.
            for slot, state in wanted["states"].items():
                if slot in got["states"] or state.numel() and state.ndim:
                    close(got["states"][slot], state)
            assert got["states"].keys() <= wanted["states"].keys(), case
        stored = [got["held"] for got in results]
        whole = sum(state.numel() for state in wanted["states"].values() if state.ndim)
        assert sum(stored) == whole if divided else stored == [whole] * world, case


def kept_exactly(divided: bool) -> dict[str, Any]:
    """What a cut does to values and moments, without a step after it."""
    (model, replica), rank = replicated(divided=divided), own_rank()
    optimizer = replica.attach_optimizer(torch.optim.AdamW(replica.optimized.values(), **SETTINGS))
    for number in range(2):
        x, y = batch(number, torch.float64)[rank]
        model.losses(x, y, spare=True).sum().backward()
        replica.reduce_gradients(len(x))
        optimizer.step()
        replica.zero_grad()
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    states = whole_states(replica, optimizer)
    replica.resize(cuts("some"), optimizer)
    for n, parameter in model.named_parameters():
        keep = cuts("some").get(n)
        select = functools.partial(torch.index_select, dim=keep[0], index=keep[1]) if keep else None
        assert torch.equal(parameter, select(values[n]) if select else values[n])
        after = whole_states(replica, optimizer)
        for slot in ("exp_avg", "exp_avg_sq"):
            state = states[f"{n}.{slot}"]
            assert torch.equal(after[f"{n}.{slot}"], select(state) if select else state)
        assert after[f"{n}.step"] == 2
    return {"buffers": [replica.values.numel(), replica.values.untyped_storage().nbytes()]}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("divided", [False, True], ids=["whole", "divided"])
def test_a_cut_keeps_values_and_moments_bit_for_bit(
    pools: Pools, world: int, divided: bool
) -> None:
    left = 9 + 3 + 6 + 7
    for got in pools(world).run(kept_exactly, divided):
        numel, nbytes = got["buffers"]
        assert numel == left
        assert nbytes == 8 * (
            -(-left // world) * world if divided else left
        )  # nothing is left over


def reused() -> list[str]:
    """Cuts without an optimizer, twice, and one of a tensor that was cast."""
    model, replica = replicated()
    replica.resize({"A": (1, torch.tensor([2, 0]))})  # the order is that of the indices
    drawn = Toy(torch.float64).A.detach()
    assert torch.equal(model.A, drawn[:, [2, 0]])
    replica.resize({"A": (0, torch.tensor([4]))})
    assert torch.equal(model.A, drawn[4:, [2, 0]])
    model.float()
    with pytest.raises(ReplicaError) as refused:
        replica.resize({"A": (0, torch.tensor([0]))})
    return [str(refused.value)]


def test_cuts_follow_one_another(pools: Pools) -> None:
    for said in pools(2).run(reused):
        assert "the adapters were cast from torch.float64 to torch.float32" in said[0]
