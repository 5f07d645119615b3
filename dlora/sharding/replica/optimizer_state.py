"""The seam between a replicated and a divided optimizer state.

                     summed gradients           an optimizer works on      then
    ReplicatedState  whole, on every rank       the parameters             nothing: all are equal
    DividedShare    this rank's part of them    1-D views of that part     the values are gathered

A share is what one rank keeps of the optimizer's state, and how the rest reaches it. The replica
and everything above it know this interface only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlora.errors import UsageError
from dlora.sharding.replica.hierarchical_reduce import Reduction, padded, reduction_bytes
from dlora.sharding.replica.step_scalars import tail_length
from dlora.sharding.topology import Topology

OPTIMIZER_STATES = ("auto", "replicated", "divided")
Named = Mapping[str, nn.Parameter]
States = Mapping[str, Mapping[str, Tensor]]  # name → slot → what this rank keeps


class Held(NamedTuple):
    """Elements [start, stop) of a flattened tensor that a rank has, and where among all it has."""

    offset: int
    start: int
    stop: int

    @property
    def place(self) -> slice:
        """Where they are in a flat tensor of all that the rank has."""
        return slice(self.offset, self.offset + self.stop - self.start)


class ReplicaError(RuntimeError):
    """The replica is no longer what it promises to be."""


def state_is_divided(setting: str) -> bool:
    """Whether the optimizer state is divided over ranks; `auto`: no.

    Raises:
        UsageError: the setting is unknown.
    """
    if setting not in OPTIMIZER_STATES:
        listed = ", ".join(OPTIMIZER_STATES)
        raise UsageError(f"sharding.optimizer_state: {setting!r} is none of {listed}")
    return setting == "divided"


class StateStrategy(Protocol):
    """One rank's share of the optimizer's work.

    Attributes:
        collective_saves: whether `states` needs all ranks.
        optimized: what an optimizer works on, by the names of the parameters.
        gradients: the flat gradients that this rank's optimizer will use, once they are summed.
        values: the flat values that go with them.
    """

    collective_saves: bool
    optimized: dict[str, nn.Parameter]
    gradients: Tensor
    values: Tensor

    def __init__(self, named: Named, reduction: Reduction) -> None: ...

    @staticmethod
    def lengths(named: Named, topology: Topology) -> tuple[int, int]:
        """Elements of the flat buffers of values and of gradients; both begin with the tensors."""

    @staticmethod
    def elements(named: Named, topology: Topology) -> int:
        """Elements of whose optimizer state a rank holds, at most."""

    @staticmethod
    def wire_bytes(named: Named, topology: Topology) -> float:
        """Ring-equivalent bytes that a rank sends per optimizer step."""

    def bind(self, values: Tensor, buffer: Tensor, gradient_views: Mapping[str, Tensor]) -> None:
        """Told where the flat buffers are, at first and whenever they have moved."""

    def drive(self, optimizer: Optimizer, before_step: Callable[[], None]) -> None:
        """Told the optimizer that works on `optimized`."""

    def sum_(self, scalars: list[float]) -> list[float]:
        """`gradients` ← Σ over ranks of the gradient buffer; returns Σ of the scalars."""

    def finalize_gradients(self, present: Mapping[str, bool], divisor: int) -> None:
        """Divide `gradients`, and make them `.grad` of `optimized`: None where not present."""

    def has_gradient(self, name: str) -> bool:
        """Whether a parameter without `.grad` counts as one whose gradient is zero."""

    def zero_grad(self) -> None:
        """Forget what `finalize_gradients` gave, where it is not the parameters' own `.grad`."""

    def norm(self) -> Tensor:
        """2-norm of the gradients of all ranks' shares, a float64 scalar; the same everywhere."""

    def scale_(self, factor: Tensor) -> None:
        """`gradients` ← factor · `gradients`."""

    def held(self) -> dict[str, Held]:
        """What `gradients` and `values` hold of each tensor."""

    def join(self, flat: Tensor) -> Tensor:
        """What every rank has computed of its share of all elements, made one: the same bits
        everywhere. Where all have the same share it is the mean, else the sum. Collective."""

    def whole(
        self, states: States, *, everywhere: bool = False
    ) -> Iterator[tuple[str, str, Tensor]]:
        """(name, slot, whole tensor) of what ranks keep of each element, one after the other.

        Where saves are collective all ranks exhaust it at the same time, and rank 0 alone gets any
        unless they are wanted `everywhere`.
        """

    def part(self, name: str, state: Tensor) -> Tensor | None:
        """What this rank keeps of a state tensor of `name`; None where it keeps none of it."""

    def rebuild_layout(self) -> None:
        """Told that the shapes of the parameters have changed; `bind` follows."""


class ReplicatedState:
    """Every rank does all of it: the sums are all-reduced, with the scalars in the buffer's tail.

    buffer  [ gradients | scalars | padding ]
    """

    collective_saves = False

    def __init__(self, named: Named, reduction: Reduction) -> None:
        self.optimized = dict(named)
        self._reduction = reduction

    @staticmethod
    def lengths(named: Named, topology: Topology) -> tuple[int, int]:
        numel = count(named)
        return numel, padded(numel + len(named) + tail_length(topology.world), topology)

    @staticmethod
    def elements(named: Named, topology: Topology) -> int:
        return count(named)

    @staticmethod
    def wire_bytes(named: Named, topology: Topology) -> float:
        return reduction_bytes(ReplicatedState.lengths(named, topology)[1] * item(named), topology)

    def bind(self, values: Tensor, buffer: Tensor, gradient_views: Mapping[str, Tensor]) -> None:
        numel = count(self.optimized)
        self.gradients, self.values = buffer[:numel], values[:numel]
        self._buffer, self._views = buffer, gradient_views

    def drive(self, optimizer: Optimizer, before_step: Callable[[], None]) -> None:
        """Equal steps on equal tensors: nothing to do."""

    def sum_(self, scalars: list[float]) -> list[float]:
        extras = self._buffer[len(self.gradients) :][: len(scalars)]
        extras.copy_(torch.tensor(scalars, dtype=torch.float64))
        self._reduction.sum_(self._buffer)
        return extras.tolist()

    def finalize_gradients(self, present: Mapping[str, bool], divisor: int) -> None:
        for name, parameter in self.optimized.items():
            parameter.grad = self._views[name] if present[name] else None
        self.gradients.div_(divisor)

    def has_gradient(self, name: str) -> bool:
        return False

    def zero_grad(self) -> None:
        """They are the parameters' own."""

    def norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.gradients, dtype=torch.float64)

    def scale_(self, factor: Tensor) -> None:
        self.gradients.mul_(factor)

    def held(self) -> dict[str, Held]:
        places, offset = {}, 0
        for name, parameter in self.optimized.items():
            places[name] = Held(offset, 0, parameter.numel())
            offset += parameter.numel()
        return places

    def join(self, flat: Tensor) -> Tensor:
        return self._reduction.sum_of(flat) / self._reduction.topology.world

    def whole(
        self, states: States, *, everywhere: bool = False
    ) -> Iterator[tuple[str, str, Tensor]]:
        for name, slots in states.items():
            for slot, state in slots.items():
                yield name, slot, state

    def part(self, name: str, state: Tensor) -> Tensor | None:
        return state

    def rebuild_layout(self) -> None:
        """Nothing depends on shapes but what `bind` is given."""


def states_of(optimizer: Optimizer, optimized: Named) -> States:
    """The tensors of an optimizer's state by the names of what it works on."""
    found = {name: optimizer.state.get(part, {}) for name, part in optimized.items()}
    return {
        name: {slot: state for slot, state in slots.items() if isinstance(state, Tensor)}
        for name, slots in found.items()
        if slots
    }


def count(named: Named) -> int:
    """Elements of all parameters."""
    return sum(parameter.numel() for parameter in named.values())


def item(named: Named) -> int:
    """Bytes of one element."""
    return next(iter(named.values())).element_size()
