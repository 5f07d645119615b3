"""Gradients sent in bfloat16: half the bytes, float32 sums, the same bits on every rank."""

from typing import Any

import pytest
import torch
import toy
from collectives import CollectiveLog
from ranks import Pools
from run_training import Runs, prepared_run
from sampling import full
from torch import Tensor
from toy import Toy, batch, own_rank

from dlora.sharding.replica.replica import Replica
from dlora.sharding.topology import Topology

NUMEL = 37
U = 2.0**-8  # rounding to bfloat16, relative


def own_gradients(rank: int) -> Tensor:
    model = Toy(torch.float32)
    x, y = batch(0, torch.float32)[rank]
    model.losses(x, y, spare=True).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def one_step(divided: bool) -> dict[str, Any]:
    """A reduction and a step of SGD of rate 1, under a log of collectives."""
    model = Toy(torch.float32)
    before = toy.flat(model)
    replica = Replica(Topology.current(), divided=divided, reduce_dtype=torch.bfloat16)
    replica.own(dict(model.named_parameters()))
    rule = torch.optim.SGD(replica.optimized.values(), lr=1.0)
    optimizer = replica.attach_optimizer(rule)
    x, y = batch(0, torch.float32)[own_rank()]
    model.losses(x, y, spare=True).sum().backward()
    replica.wire.take()
    with CollectiveLog() as log:
        reduced = replica.reduce_gradients(len(x), scalars={"loss": 2**20 + own_rank()}, each=7)
        optimizer.step()
    counted = replica.wire.take()
    replica.audit()
    strategy, topology = replica.strategy, replica.topology
    return {
        "calls": log.calls,
        "counted": counted,
        "formula": strategy.wire_bytes(replica.named, topology, 2),
        "whole": strategy.wire_bytes(replica.named, topology),
        "gradients": before - toy.flat(model),
        "reduced": reduced,
    }


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize(("world", "per_node"), [(3, 3), (4, 2), full(2, 2), full(4, 1)])
def test_sums_of_what_was_sent_for_half_the_bytes(
    pools: Pools, world: int, per_node: int, divided: bool
) -> None:
    results = pools(world).run(one_step, divided, ranks_per_node=per_node)
    tokens = sum(toy.ROWS[:world])
    each = torch.stack([own_gradients(rank) for rank in range(world)])
    exact = each.double().sum(0)
    size, levels = each.abs().double().sum(0), 2 if (world, per_node) == (4, 2) else 1
    bound = 1.01 * U * (levels * size + exact.abs()) / tokens + 1e-6  # float32 of the step
    padded = -(-NUMEL // world) * world
    saved = padded * 2 * (world - 1) / world * (1 if divided else 2)
    for result in results:
        assert torch.equal(result["gradients"], results[0]["gradients"])
        assert bool(((result["gradients"] - exact / tokens).abs() <= bound).all())
        # What is no gradient is exact.
        assert result["reduced"].tokens == tokens and result["reduced"].each == [7] * world
        assert result["reduced"].scalars["loss"] == sum(2**20 + rank for rank in range(world))
        sent = sum(call.sent() for call in result["calls"])
        assert result["formula"] == pytest.approx(sent, abs=1e-9)
        assert result["counted"] == round(sent)
        # Up to padding, as the exact scalars no longer share a tensor with the gradients.
        assert result["whole"] - sent == pytest.approx(saved, abs=8 * world)
    if levels == 1:  # what torch rounds and sums
        total = each.bfloat16().float().sum(0)
        wanted = total if divided else total.bfloat16().float()
        torch.testing.assert_close(results[0]["gradients"] * tokens, wanted, rtol=1e-5, atol=1e-5)


def planned(argv: list[str]) -> int:
    """A run; what its plan says that a reduction sends."""
    run = prepared_run(argv)
    run.train()
    return run.prepared.budget.reduction


def test_a_run_sends_what_its_plan_says(run: Runs) -> None:
    few = {"sharding__base": "none", "train__max_steps": 2}
    sent = {}
    for dtype in ("float32", "bfloat16"):
        (plan, _), lines = run(dtype, 2, work=planned, **few, sharding__reduce_dtype=dtype)
        sent[dtype] = lines[0]["wire_bytes"]  # the last step has an audit, too
        assert sent[dtype] == pytest.approx(plan, abs=1)
    assert sent["bfloat16"] < 0.6 * sent["float32"]
