"""The groups of an engine under one placement: bytes, and how often they are gathered in a step."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from dlora.plan.workload import Workload
from dlora.sharding.engines.gather_groups import Group, block_lists


@dataclass(frozen=True)
class Unit:
    """One group of a base that is divided over some ranks.

    Attributes:
        nbytes: of its parameters.
        gathered: bytes while it is gathered, padding included.
        times: gathers per optimizer step, unless it is resident.
        freed: after each use; otherwise it stays until the step ends.
        always: the engine keeps it gathered in any case.
        waits: between forward and backward it stays gathered.
    """

    path: str
    nbytes: int
    gathered: int
    times: int
    freed: bool
    always: bool
    waits: bool = False


def units_of(
    groups: Collection[Group],
    skeleton: nn.Module,
    trained: Collection[str],
    ranks: int,
    workload: Workload,
) -> tuple[Unit, ...]:
    """The frozen groups of a model over `ranks` ranks, in the order of `groups`.

    A freed group is gathered once per forward, once more for backward if a gradient reaches it and
    it did not wait, and once more where recomputation asks for it; a kept one once per step. What a
    reference has gathered for itself comes in addition, and so do the `extra_passes` without a
    gradient; one that waits for its backward stays there for them.

    Args:
        trained: names of the trained parameters.
    """
    first_trained, last_of = _order(skeleton, trained)
    # A block that computes twice in a pass gathers what is freed inside of it twice.
    joined = block_lists(skeleton) if workload.reference == "joined" else []
    inside = [
        f"{path}.{name}."
        for path in joined
        for name, _ in skeleton.get_submodule(path).named_children()
    ]
    units = []
    for group in groups:
        reached = first_trained <= last_of[group.path]
        again = group.recomputed and _is_recomputed(group.path, workload.checkpointing.every)
        passes = 1 + (reached and not group.waits) + again
        if workload.reference == "apart" or any(group.path.startswith(b) for b in inside):
            passes += not group.waits  # one that waits is still gathered from the pass before
        passes += 0 if group.waits else workload.extra_passes
        units.append(
            Unit(
                path=group.path,
                nbytes=group.nbytes,
                gathered=group.gathered_bytes(ranks),
                times=workload.micro_batches * passes if group.freed else 1,
                freed=group.freed,
                always=group.held,
                waits=group.waits,
            )
        )
    return tuple(units)


def _is_recomputed(path: str, every: int) -> bool:
    """Whether a group is in one of the blocks that recompute: the first and each `every`-th."""
    numbers = [int(part) for part in path.split(".") if part.isdigit()]
    return bool(every) and (not numbers or numbers[0] % every == 0)


def _order(skeleton: nn.Module, trained: Collection[str]) -> tuple[int, dict[str, int]]:
    """Where in the model's order the first trained module stands, and the last one in each module.

    A gradient reaches the output of a module if something trained is in or before it.
    """
    paths = [path for path, _ in skeleton.named_modules()]
    last_of: dict[str, int] = {}
    for index, path in enumerate(paths):
        last_of[path] = index
        while path:
            path = path.rpartition(".")[0]
            last_of[path] = index
    place = {path: index for index, path in enumerate(paths)}
    return min(place[name.rpartition(".")[0]] for name in trained), last_of
