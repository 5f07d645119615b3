"""Bytes before launch: what a placement costs each rank, from names and shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from dlora.errors import UsageError
from dlora.runtime import exit_with
from dlora.sharding.engine import engine_class
from dlora.sharding.groups import Group, frozen_groups
from dlora.sharding.mesh import Placement, Topology
from dlora.sharding.replica import AUDIT_EVERY, share_class
from dlora.sharding.wire import ring_gather_bytes

MOMENTS = {"adamw": 2, "sgd": 0}  # float32 values that an optimizer keeps per parameter


@dataclass(frozen=True)
class Budget:
    """Bytes per rank, and bytes that a rank sends per optimizer step (ring-equivalent).

    Attributes:
        base_total: W0, once.
        base_held: this rank's share of W0 between steps.
        base_gathered: most of W0 that is gathered at one time, above the share.
        trainable: numbers of parameters of A, B and trained copies.
        replica: their values, gradients and optimizer state.
        gathers, reduction: wire bytes per step of W0, and of the gradients.
        audit: wire bytes of the checksum, every 10th step and at the last.
    """

    placement: Placement
    ranks: int
    base_total: int
    base_held: int
    base_gathered: int
    trainable: int
    replica: int
    gathers: int
    reduction: int
    audit: int

    def lines(self) -> list[str]:
        """The budget as it is printed before the first step."""
        p = self.placement
        where = "a whole copy" if p.shard_size == 1 else f"1/{p.shard_size}"
        return [
            f"placement       base: {p.base}, engine: {p.engine}, {self.ranks} rank(s), "
            f"{where} of W0 on each",
            f"W0              {_mb(self.base_held)} of {_mb(self.base_total)} per rank, "
            f"at most {_mb(self.base_gathered)} more while gathered",
            f"A and B         {self.trainable:,} parameters; with gradients and optimizer state "
            f"{_mb(self.replica)} per rank",
            f"wire, per step  {_mb(self.gathers)} gathering W0 + {_mb(self.reduction)} reducing "
            f"gradients, sent by each rank; {self.audit} bytes every {AUDIT_EVERY}th for the audit",
        ]


def budget(
    skeleton: nn.Module,
    trainable: dict[str, nn.Parameter],
    placement: Placement,
    topology: Topology,
    *,
    optimizer: str,
    micro_batches: int,
    checkpointing: bool = False,
    divided: bool = False,
) -> Budget:
    """The budget of a model with adapters attached on the meta device.

    Args:
        trainable: A, B and trained copies by name.
        micro_batches: forward passes per rank and optimizer step.
        checkpointing: activations are recomputed in backward.
        divided: whether the optimizer state is divided over ranks.
    """
    groups = frozen_groups(engine_class(placement).groups(skeleton))
    size = placement.shard_size
    total = sum(group.nbytes for group in groups)
    gathered = [group.gathered_bytes(size) for group in groups]
    numel = sum(p.numel() for p in trainable.values())
    share = share_class(divided)
    stepped = share.elements(trainable, topology)
    item = next(iter(trainable.values())).element_size()
    sent = 0.0
    for group, nbytes in zip(groups, gathered, strict=True):
        passes = 1 + _gradient_reaches(group, skeleton, trainable)
        passes += checkpointing and group.recomputed
        times = 0 if group.held else micro_batches * passes if group.freed else 1
        sent += ring_gather_bytes(nbytes, size) * times
    always = [group.nbytes for group in groups if group.held]
    kept = sum(n for g, n in zip(groups, gathered, strict=True) if not (g.freed or g.held))
    freed = sorted((n for g, n in zip(groups, gathered, strict=True) if g.freed), reverse=True)
    return Budget(
        placement=placement,
        ranks=topology.world,
        base_total=total,
        base_held=sum(gathered) // size + (sum(always) if size > 1 else 0),
        base_gathered=0 if size == 1 else kept + sum(freed[:2]),  # one computes, one is prefetched
        trainable=numel,
        replica=(2 * numel + MOMENTS[optimizer] * stepped) * item,
        gathers=round(sent),
        audit=round(ring_gather_bytes(8 * topology.world, topology.world)),
        reduction=round(share.wire_bytes(trainable, topology)),
    )


def _gradient_reaches(group: Group, skeleton: nn.Module, trainable: Iterable[str]) -> bool:
    """Whether the output of the group needs a gradient: something trained lies in or before it."""
    order = {path: index for index, (path, _) in enumerate(skeleton.named_modules())}
    last = max(
        index
        for path, index in order.items()
        if not group.path or path == group.path or path.startswith(f"{group.path}.")
    )
    first = min(order[name.rpartition(".")[0]] for name in trainable)
    return first <= last


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def main(argv: list[str]) -> int:
    """The command that plans for machines that are not at hand; not built yet."""
    raise UsageError(
        "dlora.plan is planned for later and does not work yet; "
        "python -m dlora.train --config FILE --check prints the budget on the ranks at hand"
    )


if __name__ == "__main__":
    exit_with(main)
