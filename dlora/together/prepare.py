"""Everything that a run of several adapters needs and that can be wrong, before a weight is read.

Each adapter is prepared as for a run of it alone; what all have in common (data that are the same,
the base) is read once, and the plan is one: for the joined micro-batches and all replicas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dlora.config.adapters import configs_of
from dlora.config.load import Config
from dlora.data import Dataset, Dealing, Sampler
from dlora.errors import UsageError
from dlora.lora.attach import every_parameter, load_record
from dlora.lora.names import by_name
from dlora.plan.choose import Decision
from dlora.plan.together import attach_each, check_apart, dealing_of, joined, of_adapter, trained_of
from dlora.plan.workload import Workload, workload_of
from dlora.sharding.topology import Topology
from dlora.together.member import Standing, left_in
from dlora.training.find_checkpoint import ResumePoint
from dlora.training.material import Material, Surroundings, gather_material
from dlora.training.prepare import Planned, Preparation, decision_of, prepared_from
from dlora.training.prepare_data import Once, by_itself

Announce = Callable[[str], None]


@dataclass(frozen=True)
class JointPreparation(Planned):
    """What `prepare_together` found out; it has no weights.

    Attributes:
        config: of the run, with what the machines and the checkpoint decide of it.
        members: the preparation of each adapter, by name.
        standing: of each, as the checkpoint has it.
        decision: the one plan.
    """

    config: Config
    members: dict[str, Preparation]
    standing: dict[str, Standing]
    topology: Topology
    resumed: ResumePoint | None
    decision: Decision

    @property
    def first(self) -> Preparation:
        """Any of them, for what all have in common: the base, the task, the tokenizer."""
        return next(iter(self.members.values()))

    @property
    def total_steps(self) -> int:
        """Steps of the longest."""
        return max(own.sampler.total_steps for own in self.members.values())

    def why(self, name: str) -> str:
        """Why an adapter has left before this start, where it had not finished."""
        return str(self.resumed.of(name).state.get("why", "")) if self.resumed else ""

    @property
    def fingerprint(self) -> str:
        """A text that is equal on ranks with the same data, settings and plan."""
        return " ".join(f"{name}: {own.fingerprint}" for name, own in self.members.items())


def prepare_together(
    config: Config,
    topology: Topology,
    announce: Announce,
    resumed: ResumePoint | None = None,
    around: Surroundings = Surroundings(),  # noqa: B008 - frozen
    once: Once = by_itself,
) -> JointPreparation:
    """Prepare every adapter of `config.adapters`, and plan for all; arguments as of `prepare`.

    Raises:
        UsageError: as there, with the adapter's name; or one cannot be trained beside others.
    """
    if config.train.compile == "auto":
        announce("train.compile: off: blocks that several adapters share run without graphs")
    config = replace(config, train=replace(config.train, compile=False))
    own_configs = configs_of(config)
    _check_names(list(own_configs), resumed)
    said, data = _Said(announce, len(own_configs)), _SharedData(once)
    found: dict[str, Material] = {}
    dealings: dict[str, Dealing] = {}
    for name, own in own_configs.items():
        load = data.of(name, own)
        before = resumed.of(name) if resumed else None
        with of_adapter(name):
            found[name] = gather_material(own, topology, said.by(name), before, around, load)
            own_model, objective = found[name].model.skeleton, own.train.objective
            check_apart(own_model, found[name].lora, objective)
            _check_finished(found[name])
            about = (own, found[name].train, topology.world)
            dealings[name] = dealing_of(*about, packs=found[name].packs)
    said.flush()
    standing = {
        name: left_in(resumed.of(name).state) if resumed else Standing.RUNNING for name in found
    }
    joint = joint_skeleton(found, resumed)
    running = [name for name in found if standing[name] is Standing.RUNNING] or list(found)
    workload = _workload({name: found[name] for name in running}, dealings, topology, joint)
    trained = trained_of(joint, running)
    first = next(iter(found.values()))
    decision = decision_of(config, first.task, joint, trained, workload, topology, around, resumed)
    members = {
        name: prepared_from(own, topology, dealings[name], decision, False)
        for name, own in found.items()
    }
    return JointPreparation(config, members, standing, topology, resumed, decision)


def joint_skeleton(found: dict[str, Material], resumed: ResumePoint | None) -> nn.Module:
    """The base on the meta device with all adapters."""
    first = next(iter(found.values()))
    skeleton = first.base.skeleton()
    first.base.pack(skeleton)
    attach_each(skeleton, {name: own.lora for name, own in found.items()})
    for name in found:
        with by_name(skeleton, name):
            load_record(skeleton, resumed.of(name).record if resumed else None)
    every_parameter(skeleton)
    return skeleton


def _check_names(names: list[str], resumed: ResumePoint | None) -> None:
    if resumed is not None and sorted(resumed.names) != sorted(names):
        before = ", ".join(resumed.names) or "one without a name"
        raise UsageError(
            f"output.resume: {resumed.directory} is of a run with adapters: {before}, and this one "
            f"has {', '.join(names)} (output.resume: none starts afresh)"
        )


def _check_finished(found: Material) -> None:
    """Raise a `UsageError` for more steps of an adapter that has finished.

    Its optimizer's state is gone, so the rest would be no continuation of its run.
    """
    before, steps = found.resumed, found.sampler.total_steps
    if before is None or left_in(before.state) is not Standing.FINISHED or before.step == steps:
        return
    raise UsageError(
        f"train.{found.config.train.governed_by}: it has finished after {before.step} steps, which "
        f"its optimizer's state is no longer there to make {steps} of; train it on in a run of its "
        "own (adapter.path), or leave its steps as they were"
    )


def _workload(
    found: dict[str, Material],
    dealings: dict[str, Dealing],
    topology: Topology,
    skeleton: nn.Module,
) -> Workload:
    """The workload of all passes, as of `dlora.plan.together.joined`."""
    each: dict[str, Workload] = {}
    for name, own in found.items():
        known: tuple[Any, ...] = ()
        if isinstance(own.train, Dataset) and isinstance(own.sampler, Sampler):
            known = own.train, own.sampler
        each[name] = workload_of(own.config, topology.world, *known, dealing=dealings[name])
    return joined(each, skeleton, packs=next(iter(found.values())).packs)


class _Said:
    """What is announced while adapters are prepared: once for all where all say the same."""

    def __init__(self, announce: Announce, adapters: int) -> None:
        self._announce, self._adapters = announce, adapters
        self._lines: dict[str, list[str]] = {}

    def by(self, name: str) -> Announce:
        """Takes the lines of one."""
        return functools.partial(self._take, name)

    def _take(self, name: str, line: str) -> None:
        names = self._lines.setdefault(line, [])
        if name not in names:
            names.append(name)

    def flush(self) -> None:
        """Announce them."""
        for line, names in self._lines.items():
            whose = "" if len(names) == self._adapters else f"{', '.join(names)}: "
            self._announce(f"{whose}{line}")


class _SharedData:
    """Data sets that several adapters are trained on alike: read and kept once."""

    def __init__(self, once: Once) -> None:
        self._once, self._loaded = once, dict[str, Dataset]()

    def of(self, name: str, config: Config) -> Once:
        """Loads those of one adapter."""
        return functools.partial(self._load, name, repr((config.data, config.train.task)))

    def _load(self, name: str, settings: str, key: str, load: Callable[[], Dataset]) -> Dataset:
        known = f"{settings} {key}"
        if known not in self._loaded:
            self._loaded[known] = self._once(f"{name}/{key}", load)
        return self._loaded[known]
