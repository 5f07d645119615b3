"""The replicas of all adapters, seen as one by what saves and resumes a run.

    named, states       of the adapters that are trained
    frozen              what else of them a checkpoint has, and all of those that have left

Names are full ones, `….adapters.NAME.lora_A`, so that nothing clashes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from dlora.lora.attach import adapter_tensors, load_record
from dlora.lora.layers import adapter_of
from dlora.lora.names import by_name
from dlora.methods.trained_replica import TrainedReplica
from dlora.sharding.replica.optimizer_state import States
from dlora.sharding.topology import Topology
from dlora.together.member import Member


class Replicas:
    """The replicas as one; see `dlora.methods.trained_replica.TrainedReplica` for its members.

    Args:
        shared: of the model, which has the engine and no tensors.
        members: all adapters, in order.
    """

    def __init__(self, model: nn.Module, shared: TrainedReplica, members: Sequence[Member]) -> None:
        self._model, self._shared, self._members = model, shared, members
        self.strategy, self.method = _States(self), _Methods(model, members)
        self.reference: dict[str, Tensor] = {}  # none of them is compared with one

    @property
    def running(self) -> list[Member]:
        """The adapters that are trained."""
        return [member for member in self._members if member.running]

    @property
    def topology(self) -> Topology:
        """Ranks and nodes."""
        return self._shared.topology

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """All trained tensors."""
        return {n: p for member in self.running for n, p in member.context.replica.named.items()}

    optimized = named

    @property
    def frozen(self) -> dict[str, Tensor]:
        """All others that a checkpoint has."""
        found: dict[str, Tensor] = {}
        for member in self._members:
            if member.running:
                found |= member.context.replica.frozen
                continue
            with by_name(self._model, member.name):
                found |= adapter_tensors(self._model)
        return found

    def states(self, optimizer: Any) -> Mapping[str, States]:
        """This rank's tensors beside the adapters, by the name of their file in a checkpoint."""
        found: dict[str, dict[str, Any]] = {"optimizer": {}}
        for member in self.running:
            context = member.context
            for file, own in context.replica.states(context.optimizer).items():
                found.setdefault(file, {}).update(own)
        return found

    def owner(self, name: str) -> TrainedReplica:
        """The replica that has a tensor of this full name."""
        wanted = adapter_of(name)
        return next(m.context.replica for m in self._members if m.name == wanted)


class Optimizers:
    """The optimizers of all adapters, as far as resuming knows one."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self.state = _StateOf(self)

    @property
    def each(self) -> list[Any]:
        """Those of the adapters that are trained."""
        return [member.context.optimizer for member in self._members if member.running]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all."""
        return [group for optimizer in self.each for group in optimizer.param_groups]

    @property
    def moment_shapes(self) -> dict[nn.Parameter, Any]:
        """Of optimizers whose moments have other shapes than their parameters."""
        found: dict[nn.Parameter, Any] = {}
        for optimizer in self.each:
            found |= getattr(optimizer, "moment_shapes", {})
        return found


class _StateOf:
    """The optimizers' states by parameter, wherever it belongs."""

    def __init__(self, optimizers: Optimizers) -> None:
        self._optimizers = optimizers

    def __getitem__(self, parameter: nn.Parameter) -> Any:
        for optimizer in self._optimizers.each:
            for group in optimizer.param_groups:
                if any(own is parameter for own in group["params"]):
                    return optimizer.state[parameter]
        raise KeyError("no optimizer has this parameter")

    def get(self, parameter: nn.Parameter, default: Any) -> Any:
        found = (optimizer.state.get(parameter) for optimizer in self._optimizers.each)
        return next((state for state in found if state is not None), default)

    def values(self) -> Iterator[Any]:
        for optimizer in self._optimizers.each:
            yield from optimizer.state.values()


class _States:
    """How the optimizers' states are stored: whole on every rank, so that no save is collective."""

    collective_saves = False

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    def gather_full(self, states: States) -> Iterator[tuple[str, str, Tensor]]:
        for name, slots in states.items():
            for slot, state in slots.items():
                yield name, slot, state

    def local_part(self, name: str, state: Tensor) -> Tensor | None:
        return self._replicas.owner(name).strategy.local_part(name, state)


class _Methods:
    """The methods' states of all adapters, for checkpoints."""

    def __init__(self, model: nn.Module, members: Sequence[Member]) -> None:
        self._model, self._members = model, members

    @property
    def resized_after(self) -> int | None:
        found = [m.context.replica.method.resized_after for m in self._members if m.running]
        return min((step for step in found if step is not None), default=None)

    @property
    def working_bytes(self) -> int:
        return sum(m.context.replica.method.working_bytes for m in self._members if m.running)

    def record(self) -> dict[str, Any] | None:
        """{name: what its method records}."""
        found = {
            member.name: member.context.replica.method.record() if member.running else member.record
            for member in self._members
        }
        return {name: record for name, record in found.items() if record is not None} or None

    def load_record(self, step: int, record: Any) -> None:
        for member in self._members:
            own = (record or {}).get(member.name)
            if member.running:
                member.context.replica.method.load_record(step, own)
            else:
                member.record = own
                with by_name(self._model, member.name):
                    load_record(self._model, own)

    def load_tensors(self, file: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        named = {member.name: member for member in self._members}

        def whose(item: tuple[str, Tensor]) -> str:
            return adapter_of(item[0])

        for name, own in groupby(tensors, whose):
            named[name].context.replica.method.load_tensors(file, own)
