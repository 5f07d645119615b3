"""Bytes per rank.

all the time    share of W0 │ resident layers │ A, B, gradients │ optimizer state
                the factors of frozen offsets, of adapters that start from a matrix
                share of a teacher that is another base, what it keeps gathered in a step
                on a CPU: two snapshots of A, B and state, and one of the offsets
                on a GPU: the staging buffers through which snapshots go
and the most of
  blocks        saved activations + the busiest moment of a block │ W0: kept + two layers, on
                a GPU three
  teacher       its busiest moment │ of its base: two layers, on a GPU three; what W0 keeps
  loss          saved activations + a chunk of logits, its gradient │ W0: kept + one layer, and
                the last block, which waits for its backward
  a save        on a CPU: the copy that is written, and what clipping copies; an optimizer's step;
                gradients rounded to be sent, and what arrives of them
and an allowance for the process, and for the holes that an allocator leaves

host memory of a node of GPUs: the snapshots of two ranks, what rank 0 copies and serialises at a
save, a share of W0 that is offloaded, inputs of blocks that recompute
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dlora.checkpoint.device_copy import STAGING_BYTES
from dlora.checkpoint.snapshot import KEEPERS
from dlora.plan.activations import Trace
from dlora.plan.gathers import Unit
from dlora.plan.method import MethodPlan
from dlora.plan.state import divides, share_of, state_of
from dlora.plan.teacher_bytes import TeacherBytes
from dlora.plan.workload import Workload
from dlora.sharding.topology import Placement, Topology

# Free bytes that an allocator cannot use, as a share of those that come and go in a step.
HOLES = 1 / 16
# Freed layers at one time. CUDA: one computes, one arrives on another stream, and the allocator has
# not got back yet the one that has computed, as its pools are of one stream each.
AT_ONCE = {"cpu": 2, "cuda": 3}
# What a process takes that no tensor here accounts for. CPU: the interpreter's growth, gloo's
# buffers, scratch of matrix products. CUDA, from documentation and not measured: context and loaded
# kernels, "1 to 2 GB" in transformers' page "Model training anatomy"; NCCL's buffers, 4 MiB for a
# channel (NCCL_BUFFSIZE); cuBLAS's workspace, 32 MiB on Hopper (cublasSetWorkspace).
PROCESS = {"cpu": 60 * 10**6, "cuda": 1_200 * 10**6}
# oneDNN, which multiplies half-precision numbers on a CPU, makes kernels for each shape of a
# micro-batch and keeps the last 1,024 (measured on a machine with AMX, the demo model).
KERNELS_OF_A_SHAPE, MOST_KERNELS = 7 * 10**6, 175 * 10**6


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank; see the picture above.

    Attributes:
        base_total: W0, once.
        base_held: this rank's share of W0, padding included, and what the engine always gathers.
        resident: layers that the plan keeps gathered beside the share.
        base_gathered: most of W0 that is gathered at one time beside these, in the blocks.
        loss_gathered: the same while the loss is computed.
        adapters: values and gradients of A, B and trained copies.
        casts: A and B in the dtype of W0, for the passes of a step.
        offsets: A0 and B0 of adapters that start from a matrix.
        state: of the optimizer, and of the adapters' method.
        snapshots: the two of A, B and state and the one of the offsets, where they are in the same
            memory; else what they take on the device.
        activations: what a micro-batch takes.
        saving: most that clipping, a step or a save takes between two passes.
        process: what it takes beside tensors; a constant, and kernels.
        host: of a node's host memory, what its ranks put there from GPUs; of the node of rank 0,
            which writes checkpoints.
        at_once: freed layers that are gathered at one time.
        teacher: of a teacher, its share and what it keeps gathered in a step.
        teacher_gathered: most of it that is gathered at one time beside these.
        base_kept: of `base_gathered`, what stays until the step ends.
    """

    base_total: int
    base_held: int
    resident: int
    base_gathered: int
    loss_gathered: int
    adapters: int
    casts: int
    offsets: int
    state: int
    snapshots: int
    activations: Trace
    saving: int
    process: int
    host: int = 0
    at_once: int = 2
    teacher: int = 0
    teacher_gathered: int = 0
    base_kept: int = 0

    @property
    def replica(self) -> int:
        """A and B with their gradients and the optimizer's state."""
        return self.adapters + self.state

    @property
    def in_use(self) -> int:
        """Most bytes of tensors at one time."""
        always = self.base_held + self.resident + self.replica + self.offsets + self.snapshots
        return always + self.teacher + self.casts + self.passing

    @property
    def passing(self) -> int:
        """Most bytes at one time of tensors that a step makes and frees again."""
        return max(
            self.activations.blocks + self.base_gathered,
            self.activations.blocks * bool(self.teacher) + self.base_kept + self.teacher_gathered,
            self.activations.loss + self.loss_gathered,
            self.saving,
        )

    @property
    def allowance(self) -> int:
        """For the process, and for the holes that an allocator leaves between tensors."""
        return self.process + round(HOLES * self.passing)

    @property
    def peak(self) -> int:
        """Most bytes that the rank takes at one time."""
        return self.in_use + self.allowance

    def spares_whole(self, micro_batches: int) -> bool:
        """Whether all of W0 can stay gathered in passes of so many micro-batches without backward.

        Then nothing is saved: what is alive in one block, or at the loss, is there for each.
        """
        beside = max(self.activations.blocks, self.activations.loss) - self.activations.saved
        return self.base_total - self.resident + micro_batches * beside <= self.passing

    def holding(self, units: Iterable[Unit], held: Collection[str]) -> Memory:
        """The same rank, with the units of its placement at the paths `held` resident."""
        coming = [unit for unit in units if not unit.always]
        left = [unit for unit in coming if unit.path not in held]
        blocks, loss = most_gathered(left, self.at_once)
        resident = sum(unit.gathered for unit in coming if unit.path in held)
        kept = sum(unit.gathered for unit in left if not unit.freed)
        gathered: dict[str, Any] = {
            "base_gathered": blocks,
            "loss_gathered": loss,
            "base_kept": kept,
        }
        return replace(self, resident=resident, **gathered)


def memory_of(
    units: Iterable[Unit],
    held: Collection[str],
    trained: Mapping[str, nn.Parameter],
    *,
    placement: Placement,
    topology: Topology,
    workload: Workload,
    activations: Trace,
    divided: bool,
    device: str,
    offsets: int = 0,
    casts: int = 0,
    method: MethodPlan = MethodPlan(),  # noqa: B008 - frozen
    half: bool = False,
    teacher: TeacherBytes = TeacherBytes(),  # noqa: B008 - frozen
) -> Memory:
    """The memory of a rank.

    Args:
        units: of the placement.
        held: paths of units that stay gathered.
        trained: A, B and trained copies by name.
        divided: whether the optimizer state is divided over ranks.
        device: `"cuda"` or `"cpu"`: where the model is.
        offsets: bytes of what adapters have beside `trained`.
        casts: as of `Memory`.
        method: what their method stores.
        half: W0 is in half precision.
        teacher: of a distillation.
    """
    units = list(units)
    share, size = share_of(workload.optimizer, divided), placement.shard_size
    item = next(iter(trained.values())).element_size()
    groups = workload.groups(trained)
    states = [state_of(optimizer, named, topology, divided) for optimizer, named in groups]
    stepped = max(share.elements(named, topology) for _, named in groups)
    lengths = [share.lengths(named, topology) for _, named in groups]
    values, gradients = (sum(each) for each in zip(*lengths, strict=True))
    always = sum(unit.nbytes for unit in units if unit.always) if size > 1 else 0
    shard = sum(unit.gathered if size > 1 else unit.nbytes for unit in units) // size
    numel = sum(parameter.numel() for parameter in trained.values())
    whole = item * numel
    of_method = [share.elements(named, topology) for named in method.copies]
    kept = sum(state.whole for state in states)
    kept += item * sum(p.numel() for named in method.copies for p in named.values())
    stepping = max(state.stepping for state in states)
    # Then no rank has the whole state, so there are no snapshots.
    collective = divided or (divides(workload.optimizer) == "pairs" and topology.world > 1)
    written = 2 * (whole + kept + offsets)  # the copy, and the bytes of the files made of it
    saving = max(8 * stepped, written) if device == "cpu" else 8 * stepped
    copies = 0 if collective else 2 * (whole + kept) + offsets
    staging = min(STAGING_BYTES, whole + kept) if copies else 0
    keepers = min(KEEPERS, topology.ranks_per_node)
    away = topology.ranks_per_node * (shard * placement.offload + activations.offloaded)
    kernels = min(workload.shapes * KERNELS_OF_A_SHAPE, MOST_KERNELS)
    kernels = kernels if half and device == "cpu" else 0
    memory = Memory(
        base_total=sum(unit.nbytes for unit in units),
        base_held=always + (0 if placement.offload and device != "cpu" else shard),
        resident=0,
        base_gathered=0,
        loss_gathered=0,
        adapters=item * (values + gradients),
        casts=casts,
        offsets=offsets,
        state=sum(state.held for state in states) + item * (sum(of_method) + method.working),
        snapshots=copies if device == "cpu" else staging,
        activations=activations,
        saving=max(saving, stepping, 2 * (workload.gradient_bytes or 0) * numel),
        process=PROCESS[device] + kernels,
        host=0 if device == "cpu" else keepers * copies + written + away,
        at_once=AT_ONCE[device],
        teacher=teacher.held + teacher.kept,
        teacher_gathered=teacher.layers,
    )
    return memory if size == 1 else memory.holding(units, held)


def most_gathered(coming: Iterable[Unit], at_once: int = 2) -> tuple[int, int]:
    """Most bytes of W0 gathered at one time beside resident units: in the blocks, at the loss.

    What an engine keeps for the step counts all the time. In the blocks one layer computes and
    the next one arrives; at the loss there are the buffer in which the last one arrived, and the
    block that waits for its backward.

    Args:
        at_once: freed layers whose memory is taken at one time.
    """
    coming = list(coming)
    kept = sum(unit.gathered for unit in coming if not unit.freed)
    freed = sorted((unit.gathered for unit in coming if unit.freed), reverse=True)
    waiting = sum(unit.gathered for unit in coming if unit.waits)
    arrived = max((unit.gathered for unit in coming), default=0)
    return kept + sum(freed[:at_once]), kept + waiting + arrived
