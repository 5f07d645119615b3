"""One rank of sixteen in one process: torch's fake process group, on which nothing is sent.

What the rank would send, its sizes and order, and for what its gathers wait.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collectives import CollectiveLog
from ranks import Pools
from tiny import VOCABULARY
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from dlora import LoraConfig, attach
from dlora.base.model import find_base
from dlora.config.load import OptimizerConfig
from dlora.config.recompute import Recompute
from dlora.lora.attach import trainable_parameters
from dlora.methods.trained_replica import replicate
from dlora.plan.plan import Subject
from dlora.plan.workload import Workload
from dlora.sharding.engines import fsdp2
from dlora.sharding.engines.fsdp2 import Fsdp2
from dlora.sharding.engines.gather_groups import frozen_groups
from dlora.sharding.engines.protocol import build_engine
from dlora.sharding.topology import Topology, resolve_placement

RANK, WORLD, PER_NODE, MICRO_BATCHES = 3, 16, 4, 3
R, ROWS, TOKENS = 2, 1, 9


def as_rank(work: Callable[..., Any], *arguments: Any) -> Any:
    """`work` in a process group of its own, as rank 3 of 16 ranks on 4 nodes."""
    os.environ["LOCAL_WORLD_SIZE"] = str(PER_NODE)
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=WORLD)
    try:
        return work(*arguments)
    finally:
        dist.destroy_process_group()


def sharded(path: str, base: str) -> tuple[Any, Any]:
    topology = Topology(RANK, WORLD, PER_NODE)
    engine = build_engine(resolve_placement("fsdp2", base, topology), topology)
    model = find_base(path, dtype="float32").load(engine, torch.device("cpu"))
    attach(model, LoraConfig(r=R))
    return model, replicate(model, engine)


def passes(model: Any) -> None:
    ids = torch.randint(VOCABULARY, (ROWS, TOKENS))
    model(input_ids=ids, labels=ids).loss.backward()


def one_step(path: str, base: str) -> dict[str, Any]:
    """The collectives of a second step, and what its counter says."""
    model, replica = sharded(path, base)
    optimizer = torch.optim.AdamW(replica.parameter_groups(lr=1e-3))
    for _ in range(2):
        replica.wire.take()
        with CollectiveLog() as log:
            for _ in range(MICRO_BATCHES):
                passes(model)
            replica.reduce_gradients()
        optimizer.step()
        replica.zero_grad()
    return {"calls": log.calls, "counted": replica.wire.take()}


def planned(path: str, base: str) -> tuple[Any, int]:
    """The plan of such a step, and bytes of one gathered block."""
    skeleton = find_base(path, dtype="float32").skeleton()
    attach(skeleton, LoraConfig(r=R))
    step = Workload(ROWS, TOKENS, MICRO_BATCHES, OptimizerConfig(), Recompute(0))
    subject = Subject(skeleton, trainable_parameters(skeleton), step, device="cpu")
    topology = Topology(RANK, WORLD, PER_NODE)
    placement = resolve_placement("fsdp2", base, topology)
    blocks = [g for g in Fsdp2.groups(skeleton) if g.path.startswith("model.layers.")]
    [block] = {group.gathered_bytes(placement.shard_size) for group in frozen_groups(blocks)}
    return subject.plan(placement, topology), block


@pytest.mark.parametrize("base", ["world", "node", "none"])
def test_a_rank_of_sixteen_sends_what_the_plan_says(
    pools: Pools, saved_models: Any, base: str
) -> None:
    """Each collective with its bytes: blocks twice but for the last one, and one reduction."""
    path = saved_models("llama")
    [found] = pools(1).run(as_rank, one_step, path, base)
    plan, block = planned(path, base)
    calls = found["calls"]
    assert sum(call.sent() for call in calls) == plan.gathers + plan.reduction == found["counted"]
    # NCCL takes one dtype, contiguous tensors, and none of another device than the rank's.
    assert {call.kinds for call in calls} == {frozenset({("cpu", torch.float32, True)})}
    *gathers, scattered, reduced, spread = calls
    assert sum(call.sent() for call in gathers) == plan.gathers
    assert [scattered.op, reduced.op] == ["_reduce_scatter_base_", "allreduce_"]
    gradients = 4 * plan.trainable
    assert gradients <= scattered.nbytes == spread.nbytes < gradients + 512  # scalars, padding
    assert reduced.nbytes == scattered.nbytes // PER_NODE
    assert reduced.ranks == (3, 7, 11, 15) and spread.ranks == (0, 1, 2, 3)
    whole = {"world": tuple(range(16)), "node": (0, 1, 2, 3)}
    assert {call.ranks for call in gathers} == ({whole[base]} if base != "none" else set())
    if base == "none":
        return
    # Of two blocks the second, which backward begins with, is there already.
    assert [call.nbytes for call in gathers].count(block) == MICRO_BATCHES * (2 * 2 - 1)


def waits(path: str) -> list[set[Any]]:
    """What the gathers' streams wait for at the start of each of four passes: an event, by its
    number, or the stream that computes. W0 changes before the last one.
    """
    model, replica = sharded(path, "world")
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    seen: list[list[Any]] = []
    kept: list[Any] = []  # so that no two of them have one address

    def event(stream: Any, event: Any) -> None:
        kept.append(event)
        seen[-1].append(id(event))

    def stream(stream: Any, other: Any) -> None:
        if other is torch.cpu.current_stream():
            seen[-1].append("all that was computed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu.Stream, "wait_event", event)
        patch.setattr(torch.cpu.Stream, "wait_stream", stream)
        for step in range(4):
            if step == 3:
                with torch.no_grad():
                    weight.to_local().zero_()  # type: ignore[operator]
            seen.append([])
            passes(model)
            replica.release()
    return [found[0] for found in seen]


def test_gathers_wait_for_w0_and_for_nothing_else(pools: Pools, saved_models: Any) -> None:
    """On a GPU they run beside the optimizer and the end of the last backward."""
    [(_, second, third, changed)] = pools(1).run(as_rank, waits, saved_models("llama"))
    assert second == third != changed
    assert "all that was computed" not in (second, changed)


class Order(TorchDispatchMode):
    """Inside, gathers and products in the order in which they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.words += [w for w in ("gather", "mm") if w in func._schema.name]
        return func(*args, **(kwargs or {}))


def order(path: str, beside: bool) -> dict[str, Any]:
    """Gathers and products of blocks in the order in which a forward asks for them.

    Args:
        beside: gathers run beside computation, as on a GPU.
    """
    with pytest.MonkeyPatch.context() as patch:
        if beside:
            patch.setattr(fsdp2, "gathers_run_beside", lambda model: True)
        model, replica = sharded(path, "world")
    passes(model)
    replica.release()
    replica.wire.take()
    with Order() as log:
        passes(model)
    return {"words": log.words, "sent": replica.wire.take()}


def test_a_block_asks_for_the_next_one_before_it_computes(pools: Pools, saved_models: Any) -> None:
    """As many gathers as without, each of them earlier."""
    path = saved_models("llama")
    [[plain], [ahead]] = ([*pools(1).run(as_rank, order, path, p)] for p in (False, True))
    assert plain["sent"] == ahead["sent"]
    assert sorted(plain["words"]) == sorted(ahead["words"])
    # Embedding, first block; and the second one only once the first has computed, or before that.
    first = plain["words"].index("mm")
    assert ahead["words"][first] == "gather" != plain["words"][first]
    assert ahead["words"][:first] == plain["words"][:first] == ["gather"] * first
