"""Pairs spread over ranks against one process: values, states, and what a rank keeps and sends."""

import functools
from typing import Any

import pytest
import torch
from collectives import CollectiveLog
from ranks import Pools
from run_training import same_bits
from torch import Tensor, nn
from toy import batch, moved, own_rank

from dlora.checkpoint.host_copy import capture, restore
from dlora.optim.lora_pro import LoraPro
from dlora.sharding.replica.optimizer_state import States, states_of
from dlora.sharding.replica.owned_state import owners
from dlora.sharding.replica.replica import Replica, ReplicaError
from dlora.sharding.topology import Topology

SHAPES = [(2, 2), (3, 3), (4, 2), (4, 1), (3, 2)]  # ranks, ranks per node
PAIRS = {"p": (5, 3, 2), "q": (4, 5, 3), "u": (6, 4, 1), "v": (2, 6, 2)}  # m, n, r
SCALE, STEPS = 2.0, 4
MOMENTS = ("low", "full")
# Elements of each pair, and of its [m, n].
NUMELS = {name: r * (m + n) for name, (m, n, r) in PAIRS.items()}
WHOLES = {name: m * n for name, (m, n, _) in PAIRS.items()}


class Chain(nn.Module):
    """3 → 5 → 4 → 6 → 2 through four pairs over frozen weights, and a vector; W [m, n]."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.frozen, self.pairs = {}, []
        for name, (m, n, r) in PAIRS.items():
            W, A, B = (
                torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
                for shape in ((m, n), (r, n), (m, r))
            )
            self.frozen[name] = W
            # As in training: one layer starts at zero, the others are under way.
            self.register_parameter(f"{name}_A", nn.Parameter(A))
            self.register_parameter(f"{name}_B", nn.Parameter(B * (0 if name == "q" else 0.3)))
            self.pairs.append((self.get_parameter(f"{name}_A"), self.get_parameter(f"{name}_B")))
        self.b = nn.Parameter(torch.zeros(4, dtype=dtype))

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """One loss for each row."""
        for index, (name, (A, B)) in enumerate(zip(PAIRS, self.pairs, strict=True)):
            x = torch.tanh(x @ (self.frozen[name] + SCALE * B @ A).t())
            if index == 1:
                x = x + self.b
            if index == 2:
                x = x.repeat(1, 2)[:, :6]
        return (x - y).square().sum(-1)


def optimizer_of(model: Chain, moments: str) -> LoraPro:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "lr": 0.02, "weight_decay": 0.1},
        {"params": [model.b], "lr": 0.02, "weight_decay": 0.0},
    ]
    return LoraPro(groups, [(A, B, SCALE) for A, B in model.pairs], moments=moments)


def spread(moments: str, dtype: torch.dtype) -> tuple[Chain, Replica, LoraPro]:
    model, replica = Chain(dtype), Replica(Topology.current())
    replica.own(dict(model.named_parameters()))
    optimizer = optimizer_of(model, moments)
    replica.attach_optimizer(optimizer)
    return model, replica, optimizer


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def one_step(model: Chain, replica: Replica, optimizer: LoraPro, step: int) -> None:
    x, y = batch(step, next(model.parameters()).dtype)[own_rank()]
    model.losses(x, y).sum().backward()
    replica.reduce_gradients(len(x))
    replica.clip(1.0)
    optimizer.step()
    replica.zero_grad()


def kept(replica: Replica, optimizer: LoraPro) -> dict[str, States]:
    return {"optimizer": states_of(optimizer, replica.optimized)}


def state_of(replica: Replica, optimizer: LoraPro) -> dict[str, Tensor] | None:
    captured = capture(replica, kept(replica, optimizer), {})
    return captured and captured.states["optimizer"]


def train(moments: str, dtype: torch.dtype) -> dict[str, Any]:
    model, replica, optimizer = spread(moments, dtype)
    names = {id(parameter): name for name, parameter in replica.named.items()}
    for step in range(STEPS):
        one_step(model, replica, optimizer, step)
    replica.audit()
    kept = {names[id(p)]: [v.numel() for v in s.values()] for p, s in optimizer.state.items()}
    return {"values": values(model), "kept": kept, "state": state_of(replica, optimizer)}


def reference(moments: str, dtype: torch.dtype, world: int) -> dict[str, Any]:
    """The same steps on all rows at once, without a replica."""
    model = Chain(dtype)
    optimizer = optimizer_of(model, moments)
    for step in range(STEPS):
        parts = [model.losses(x, y) for x, y in batch(step, dtype)[:world]]
        torch.cat(parts).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {f"{named[id(p)]}.{k}": v for p, s in optimizer.state.items() for k, v in s.items()}
    return {"values": values(model), "state": state}


def train_each() -> list[dict[str, Any]]:
    return [train(moments, torch.float64) for moments in MOMENTS]


@pytest.mark.parametrize(("world", "per_node"), [(1, 1), *SHAPES])
def test_training_equals_one_process(pools: Pools, world: int, per_node: int) -> None:
    """T7, and each state is stored by one rank: all of a pair's by the same."""
    by_rank = pools(world).run(train_each, ranks_per_node=per_node)
    close = functools.partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)
    for moments, *results in zip(MOMENTS, *by_rank, strict=True):
        expected = reference(moments, torch.float64, world)
        for got in results:
            close(got["values"], expected["values"])
            assert same_bits(got["values"], results[0]["values"])
            assert world == 1 or (got["state"] is None) == (got is not results[0])
        close(results[0]["state"], expected["state"])
        for name in PAIRS:
            factors = ("A", "B") if moments == "low" else ("A",)
            owner = [{f for f in ("A", "B") if f"{name}_{f}" in got["kept"]} for got in results]
            assert [stored for stored in owner if stored] == [set(factors)]
        assert all(got["kept"]["b"] == [1, 4, 4] for got in results)
        each = NUMELS if moments == "low" else WHOLES
        stored = [sum(sum(s[1:]) for n, s in got["kept"].items() if n != "b") for got in results]
        assert sum(stored) == 2 * sum(each.values())


def wire() -> dict[str, Any]:
    model, replica, optimizer = spread("low", torch.float32)
    x, y = batch(0, torch.float32)[own_rank()]
    model.losses(x, y).sum().backward()
    replica.reduce_gradients(len(x))
    replica.wire.take()
    with CollectiveLog() as log:
        optimizer.step()
    return {"calls": log.calls, "counted": replica.wire.take()}


@pytest.mark.parametrize(("world", "per_node"), SHAPES)
def test_a_step_ends_with_one_gathering(pools: Pools, world: int, per_node: int) -> None:
    """Of as many values as the rank has that owns most, from each rank; on each level once."""
    two_levels = world == 4 and per_node == 2
    for result in pools(world).run(wire, ranks_per_node=per_node):
        assert {call.op for call in result["calls"]} == {"_allgather_base_"}
        assert len(result["calls"]) == (2 if two_levels else 1)
        assert result["counted"] == round(sum(call.sent() for call in result["calls"]))
        last = result["calls"][-1]
        assert last.nbytes % (4 * world) == 0
        assert sum(NUMELS.values()) <= last.nbytes // 4 <= 2 * sum(NUMELS.values())


def test_owners_are_balanced_and_everywhere_the_same() -> None:
    assert owners([1, 5, 3, 3], 2) == [1, 0, 1, 1] or owners([1, 5, 3, 3], 2) == [0, 0, 1, 1]
    costs = [float(1 + index * 7 % 5) for index in range(40)]
    for ranks in (1, 2, 3, 7):
        load = [0.0] * ranks
        for cost, rank in zip(costs, owners(costs, ranks), strict=True):
            load[rank] += cost
        assert max(load) - min(load) <= max(costs)
    assert set(owners([1.0] * 3, 8)) == {0, 1, 2}


# -- checkpoints ----------------------------------------------------------------------------------


def saved() -> list[Any]:
    """What rank 0 saves after two steps, and the values and the state after four."""
    found = []
    for moments in MOMENTS:
        model, replica, optimizer = spread(moments, torch.float32)
        for step in range(2):
            one_step(model, replica, optimizer, step)
        checkpoint = capture(replica, kept(replica, optimizer), {})
        for step in range(2, STEPS):
            one_step(model, replica, optimizer, step)
        files = checkpoint and (checkpoint.tensors, checkpoint.states["optimizer"])
        found.append((files, values(model), state_of(replica, optimizer)))
    return found


def resumed(saved_files: list[Any]) -> list[Any]:
    """What is saved right after restoring, and the values and the state after the other steps."""
    found = []
    for moments, (tensors, states) in zip(MOMENTS, saved_files, strict=True):
        model, replica, optimizer = spread(moments, torch.float32)
        restore(tensors.items(), states.items(), replica, optimizer)
        restored, own = state_of(replica, optimizer), {id(p) for p in optimizer.state}
        for step in range(2, STEPS):
            one_step(model, replica, optimizer, step)
        assert {id(parameter) for parameter in optimizer.state} == own
        found.append((restored, values(model), state_of(replica, optimizer)))
    return found


def test_a_checkpoint_goes_on_bit_for_bit_and_knows_no_ranks(pools: Pools) -> None:
    rank_0, rank_1 = pools(2).run(saved)
    files = [files for files, _, _ in rank_0]
    assert [files for files, _, _ in rank_1] == [None] * len(MOMENTS)
    for rank, results in enumerate(pools(2).run(resumed, files)):
        for (_, got, state), (_, wanted, wanted_state) in zip(results, rank_0, strict=True):
            assert same_bits(got, wanted)
            assert same_bits(state, wanted_state) if rank == 0 else state is None
    # On other ranks it is a run on other rows; that its state arrives is what counts here.
    for world in (1, 3, 4):
        results, *_ = pools(world).run(resumed, files, ranks_per_node=2)
        for (restored, _, state), (_, states) in zip(results, files, strict=True):
            assert same_bits(restored, states)
            assert state.keys() == states.keys()
            assert all(state[name] == STEPS for name in state if name.endswith(".step"))


# -- guards ---------------------------------------------------------------------------------------


def moved_each() -> list[dict[str, Tensor]]:
    moments = ("never", "before the step", "after the step")
    return [moved(*spread("low", torch.float64), when) for when in moments]


def test_moved_parameters_are_bound_again(pools: Pools) -> None:
    for unmoved, *others in pools(2).run(moved_each):
        assert all(same_bits(got, unmoved) for got in others)


def stranger() -> str:
    _, replica, _ = spread("low", torch.float64)
    with pytest.raises(ReplicaError) as stopped:
        replica.attach_optimizer(optimizer_of(Chain(torch.float64), "low"))
    return str(stopped.value)


def test_an_optimizer_of_other_tensors_is_refused(pools: Pools) -> None:
    assert (
        pools(2).run(stranger) == ["the optimizer works on tensors that are not the replica's"] * 2
    )
