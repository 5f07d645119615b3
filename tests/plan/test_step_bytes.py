"""Bytes that clipping, an audit and a snapshot take, counted over fake tensors, beside the plan's.

Nothing above 64 MB is there that the plan does not list.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Mapping

import pytest
import torch
from adalora_nets import Ours, adapted, mse
from fake_cuda import fake_cuda
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dlora.checkpoint import device_copy
from dlora.checkpoint.device_copy import STAGING_BYTES, copy_in_pieces
from dlora.checkpoint.format import Checkpoint, contents_of
from dlora.checkpoint.host_copy import capture
from dlora.checkpoint.host_room import Key
from dlora.checkpoint.snapshot import Snapshots
from dlora.config.load import OptimizerConfig
from dlora.config.recompute import Recompute
from dlora.plan.activations import Trace
from dlora.plan.fake_memory import LiveBytes
from dlora.plan.gathers import Unit
from dlora.plan.memory import Memory, memory_of
from dlora.plan.method import MethodPlan, method_plan
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


def planned(
    device: torch.device,
    offsets: int = 0,
    ranks: int = 1,
    named: Mapping[str, nn.Parameter] | None = None,
    method: MethodPlan = MethodPlan(),  # noqa: B008 - frozen
) -> Memory:
    """The plan of a rank that has these trained tensors, bytes of frozen offsets, and no W0.

    Args:
        named: the trained tensors, if they are others than SHAPES.
    """
    shapes = {n: nn.Parameter(torch.empty(s, device="meta")) for n, s in SHAPES.items()}
    return memory_of(
        [],
        [],
        shapes if named is None else named,
        placement=resolve_placement("fsdp2", "none", ONE),
        topology=Topology(0, ranks, ranks),
        workload=Workload(1, 8, 1, OptimizerConfig(), Recompute(0)),
        activations=Trace(0, 0, 0, 0),
        divided=False,
        device=device.type,
        offsets=offsets,
        method=method,
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
                snapshots.take(step, {}, replica, states=states, record=None, frozen={}, state={})
    plan = planned(cpu).snapshots
    assert plan <= live.peaks[""] <= plan + FREE
    assert plan == 2 * 3 * SIZE  # two of values and two moments


def of_adalora(run: Ours) -> tuple[dict[Key, Tensor], int]:
    """(what a snapshot copies now, bytes that the plan has for snapshots of these adapters)."""
    tensors = {("adapter", name): p.detach() for name, p in run.replica.named.items()}
    for file, states in run.replica.states(run.optimizer).items():
        for name, slots in states.items():
            tensors |= {(file, f"{name}.{slot}"): state for slot, state in slots.items()}
    counts = sum(state.nbytes for state in tensors.values() if not state.ndim)  # of steps
    plan = planned(torch.device("cpu"), named=run.replica.named, method=method_plan(run.model))
    return tensors, plan.snapshots + 2 * counts


def test_adalora_s_snapshots_shrink_to_what_the_plan_says() -> None:
    """Until the last mask they have the averages as well; after it what is left of A, B and state,
    each buffer as soon as it is filled again."""
    run, snapshots = Ours.start(adapted(total_step=20, tfinal=10)), Snapshots()
    held, plans = {}, {}
    for step in range(1, 13):
        run.step(mse(run.model, step))
        states = run.replica.states(run.optimizer)
        snapshots.take(step, {}, run.replica, states=states, record=None, frozen={}, state={})
        flat = [part for b in snapshots._newest_first for part in b.room.flat.values()]
        held[step], plans[step] = sum(part.nbytes for part in flat), of_adalora(run)[1]
    assert run.replica.method.resized_after == 10
    assert held[2] == held[9] == plans[2] == plans[9]
    assert held[11] == held[12] == plans[11] == plans[12] < held[9] / 2
    assert 2 * held[10] == held[9] + held[11]


def test_adalora_s_pinned_memory_shrinks_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is pinned for a GPU, the old is given up before there is more."""
    held: dict[int, int] = {}  # bytes by address
    most = []

    def pin(address: int, nbytes: int) -> None:
        held[address] = nbytes
        most.append(sum(held.values()))

    monkeypatch.setattr(device_copy, "pin_memory", pin)
    monkeypatch.setattr(device_copy, "unpin_memory", held.pop)
    run, snapshots = Ours.start(adapted(total_step=20, tfinal=10)), Snapshots()
    found = {}
    for step in range(1, 13):
        run.step(mse(run.model, step))
        tensors, plan = of_adalora(run)
        with fake_cuda() as cuda:
            there = {
                k: torch.empty(t.shape, dtype=t.dtype, device=cuda) for k, t in tensors.items()
            }
        room = snapshots._newest_first[step % 2].room
        room.lay_out(there)
        found[step] = sum(held.values()), plan
    assert found[2][0] == found[9][0] == found[9][1] == max(most)
    assert found[11][0] == found[12][0] == found[12][1] < found[9][0] / 2


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


def test_a_gpu_reserves_three_gathered_layers_and_a_cpu_two() -> None:
    """Of those that are freed, the largest: its allocator's pools are of one stream each."""
    units = [
        Unit(f"layers.{i}", size, size, times=2, freed=True, always=False)
        for i, size in enumerate((30, 50, 20, 40))
    ]
    kept = Unit("", 7, 7, times=1, freed=False, always=False)
    topology = Topology(0, 2, 2)
    found = {
        device: memory_of(
            [*units, kept],
            [],
            {"A": nn.Parameter(torch.empty(2, 3, device="meta"))},
            placement=resolve_placement("fsdp2", "world", topology),
            topology=topology,
            workload=Workload(1, 8, 1, OptimizerConfig(), Recompute(0)),
            activations=Trace(0, 0, 0, 0),
            divided=False,
            device=device,
        ).base_gathered
        for device in ("cpu", "cuda")
    }
    assert found == {"cpu": 7 + 50 + 40, "cuda": 7 + 50 + 40 + 30}
