"""Bytes that clipping, an audit and a snapshot take, counted over fake tensors, beside the plan's.

Nothing above 64 MB is there that the plan does not list.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest
import torch
from fake_cuda import fake_cuda
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dlora.checkpoint.device_copy import STAGING_BYTES, copy_in_pieces
from dlora.checkpoint.format import Checkpoint, contents_of
from dlora.checkpoint.host_copy import capture
from dlora.checkpoint.snapshot import Snapshots
from dlora.config.load import OptimizerConfig
from dlora.config.recompute import Recompute
from dlora.plan.activations import Trace
from dlora.plan.fake_memory import LiveBytes
from dlora.plan.memory import Memory, memory_of
from dlora.plan.workload import Workload
from dlora.sharding.replica import audit
from dlora.sharding.replica.optimizer_state import states_of
from dlora.sharding.replica.replica import Replica
from dlora.sharding.topology import Topology, resolve_placement

FREE = 64 << 20  # bytes that need no line in the plan
ONE = Topology(0, 1, 1)
SHAPES = {"head": (128_256, 4096), "A": (16, 4096), "B": (4096, 16)}  # a trained head of Llama 3's
SIZE = 4 * sum(a * b for a, b in SHAPES.values())


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cuda":
        with fake_cuda() as cuda:
            yield cuda
        return
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cpu")


def trained(device: torch.device) -> tuple[Replica, torch.optim.Optimizer]:
    """A replica after a step of AdamW."""
    replica = Replica(ONE)
    replica.own({name: nn.Parameter(torch.empty(s, device=device)) for name, s in SHAPES.items()})
    optimizer = torch.optim.AdamW(list(replica.optimized.values()), fused=True)
    for part in replica.optimized.values():
        part.grad = torch.zeros_like(part)
    optimizer.step()
    return replica, optimizer


def planned(device: torch.device, offsets: int = 0, ranks: int = 1) -> Memory:
    """The plan of a rank that has these trained tensors, bytes of frozen offsets, and no W0."""
    shapes = {n: nn.Parameter(torch.empty(s, device="meta")) for n, s in SHAPES.items()}
    return memory_of(
        [],
        [],
        shapes,
        placement=resolve_placement("fsdp2", "none", ONE),
        topology=Topology(0, ranks, ranks),
        workload=Workload(1, 8, 1, OptimizerConfig(), Recompute(0)),
        activations=Trace(0, 0, 0, 0),
        divided=False,
        device=device.type,
        offsets=offsets,
    )


def counted(replica: Replica, optimizer: torch.optim.Optimizer, *others: Tensor) -> LiveBytes:
    """Counts what is made beside the trained tensors, their state, and others."""
    states = [s for slots in optimizer.state.values() for s in slots.values()]
    return LiveBytes([*replica.named.values(), replica.values, replica.gradients, *states, *others])


def test_a_clip_takes_what_the_plan_says(device: torch.device) -> None:
    replica, optimizer = trained(device)
    with counted(replica, optimizer) as live:
        replica.clip(1.0)
    saving = planned(device).saving
    assert live.peaks[""] <= saving + FREE
    assert saving >= 2 * SIZE  # the squares are summed in float64, of which a CPU makes a copy


def test_an_audit_takes_nothing_that_grows(device: torch.device) -> None:
    replica, optimizer = trained(device)
    with counted(replica, optimizer) as live:
        for tensor in replica.named.values():
            audit._checksum(tensor.detach())
    assert 0 < live.peaks[""] <= FREE < SIZE


def test_snapshots_take_what_the_plan_says_in_host_memory() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        replica, optimizer = trained(cpu := torch.device("cpu"))
        snapshots = Snapshots()
        with counted(replica, optimizer) as live:
            for step in range(1, 5):
                states = {"optimizer": states_of(optimizer, replica.optimized)}
                snapshots.take(step, {}, replica, states=states, record=None, frozen={})
    plan = planned(cpu).snapshots
    assert plan <= live.peaks[""] <= plan + FREE
    assert plan == 2 * 3 * SIZE  # two of values and two moments


def test_a_snapshot_takes_the_staging_buffer_on_a_gpu() -> None:
    with fake_cuda() as cuda:
        replica, optimizer = trained(cuda)
        host = torch.empty(replica.numel)
        with counted(replica, optimizer, host) as live:
            staging = torch.empty(STAGING_BYTES // 4, device=cuda)
            copy_in_pieces([p.detach() for p in replica.named.values()], host, staging)
    assert planned(cuda).snapshots == STAGING_BYTES == live.peaks[""]


def serialised(tensor: Tensor) -> int:
    """Most bytes that the files take of a checkpoint with three times this tensor."""
    states = {"A.m": tensor.clone(), "A.v": tensor.clone()}
    content = Checkpoint({"A": tensor}, {"optimizer": states}, {})
    tracemalloc.start()
    try:
        contents_of(content, "")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_save_takes_what_the_plan_says_in_host_memory() -> None:
    """Of a node of GPUs, once: the copy on rank 0 and as many bytes of files."""
    with fake_cuda() as cuda:
        replica, optimizer = trained(cuda)
        frozen = {"A0": torch.empty(SHAPES["A"], device=cuda)}
        offsets, states = frozen["A0"].nbytes, {"optimizer": states_of(optimizer, replica.named)}
        with counted(replica, optimizer, *frozen.values()) as live:
            captured = capture(replica, states, {}, frozen=frozen)
            copied = live.now
        assert captured is not None
    copy = 3 * SIZE + offsets  # values and two moments
    assert copy <= copied <= copy + 64
    for ranks, keepers in ((1, 1), (8, 2)):
        snapshots = keepers * (2 * 3 * SIZE + offsets)
        assert planned(cuda, offsets, ranks).host == snapshots + 2 * copy
    sample = torch.ones(1 << 20)
    assert 3 * sample.nbytes <= serialised(sample) <= 3.05 * sample.nbytes
