"""How the optimizer's state and work are distributed over ranks: the interface, and the plain case.

                     summed gradients      an optimizer works on    after a step
    ReplicatedState  whole on every rank   the parameters           nothing: all ranks are equal
    OwnedState       whole on every rank   the units it owns        owned values are gathered
    ShardedState     this rank's part      1-D views of that part   all values are gathered

The replica and everything above it know this interface only. A strategy is chosen once, when the
replica gets its parameters (`replica.strategy_class`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlora.errors import UsageError
from dlora.sharding.replica.hierarchical_reduce import (
    Reduction,
)
from dlora.sharding.replica.step_scalars import Scalar
from dlora.sharding.topology import Topology

OPTIMIZER_STATES = ("auto", "replicated", "divided")
Named = Mapping[str, nn.Parameter]
States = Mapping[str, Mapping[str, Tensor]]  # name → slot → what this rank stores of it


class LocalSlice(NamedTuple):
    """Elements [start, stop) of a flattened tensor that a rank stores.

    Attributes:
        offset: where they begin in the flat tensor of everything that the rank stores.
    """

    offset: int
    start: int
    stop: int

    @property
    def place(self) -> slice:
        """Where they are in the flat tensor of everything that the rank stores."""
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
        raise UsageError(f"sharding.optimizer_state: expected one of {listed}, got {setting!r}")
    return setting == "divided"


class StateStrategy(Protocol):
    """How one rank takes part in the optimizer's work.

    Attributes:
        collective_saves: whether all ranks must take part in `gather_full`.
        optimized: what an optimizer works on, by the names of the parameters.
        gradients: the flat gradients that this rank's optimizer uses, once they are summed.
        values: the flat values that go with them.
    """

    optimized: dict[str, nn.Parameter]
    gradients: Tensor
    values: Tensor

    def __init__(self, named: Named, reduction: Reduction) -> None: ...

    @property
    def collective_saves(self) -> bool: ...

    @staticmethod
    def lengths(named: Named, topology: Topology) -> tuple[int, int]:
        """Elements of the flat buffers of values and of gradients; both begin with the tensors."""

    @staticmethod
    def elements(named: Named, topology: Topology) -> int:
        """The most elements whose optimizer state a rank stores."""

    @staticmethod
    def wire_bytes(named: Named, topology: Topology, sent: int | None = None) -> float:
        """Ring-equivalent bytes that a rank sends per optimizer step.

        Args:
            sent: bytes of an element of the gradients as it is sent; None: its own.
        """

    def attach_buffers(
        self, values: Tensor, buffer: Tensor, gradient_views: Mapping[str, Tensor]
    ) -> None:
        """Use these flat buffers; called at first and whenever they have moved.

        Args:
            values: flat, of the first of `lengths`.
            buffer: of the gradients, flat, of the second.
            gradient_views: views of `buffer` in the shapes of the parameters, by name.
        """

    def attach_optimizer(self, optimizer: Optimizer, before_step: Callable[[], None]) -> None:
        """Use the optimizer that works on `optimized`.

        Args:
            before_step: called before each of its steps where these become collective.
        """

    def sum_(self, scalars: Sequence[Scalar]) -> Tensor:
        """`gradients` ← Σ over ranks of the gradient buffer.

        Returns:
            [len(scalars) + 1] float64: Σ of each scalar, and the 2-norm of the summed gradients.
        """

    def finalize_gradients(self, present: Mapping[str, bool], divisor: int) -> None:
        """Divide `gradients`, and make them `.grad` of `optimized`: None where not present."""

    def has_gradient(self, name: str) -> bool:
        """Whether a parameter without `.grad` counts as one whose gradient is zero."""

    def zero_grad(self) -> None:
        """Remove what `finalize_gradients` set, where it is not the parameters' own `.grad`."""

    def norm(self) -> Tensor:
        """2-norm of the gradients over all ranks, a float64 scalar; the same everywhere."""

    def scale_(self, factor: float | Tensor) -> None:
        """`gradients` ← factor · `gradients`."""

    def local_slices(self) -> dict[str, LocalSlice]:
        """The elements of each tensor that `gradients` and `values` contain."""

    def combine(self, flat: Tensor) -> Tensor:
        """The whole of what each rank has computed from its elements. Collective.

        Returns:
            The same bits everywhere: the mean where all ranks have all elements, else the sum.
        """

    def gather_full(
        self, states: States, *, everywhere: bool = False
    ) -> Iterator[tuple[str, str, Tensor]]:
        """(name, slot, whole tensor) of what ranks store for each element, one after the other.

        Where saves are collective, all ranks exhaust it at the same time, and rank 0 alone gets the
        tensors unless they are wanted `everywhere`.
        """

    def local_part(self, name: str, state: Tensor) -> Tensor | None:
        """This rank's part of a whole state tensor of `name`; None where it stores none of it."""

    def rebuild_layout(self) -> None:
        """Follow changed shapes of the parameters; `attach_buffers` comes next."""


def states_of(optimizer: Optimizer, optimized: Named) -> States:
    """The tensors of an optimizer's state by the names of what it works on."""
    found = {name: optimizer.state.get(part, {}) for name, part in optimized.items()}
    return {
        name: {slot: state for slot, state in slots.items() if isinstance(state, Tensor)}
        for name, slots in found.items()
        if slots
    }


class StateDevices:
    """Where an optimizer wants the tensors of its state, as in torch's `load_state_dict`.

    A count of steps is on the CPU, unless the kernel that steps reads it (`fused`, `capturable`);
    all else is beside its parameter.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._near = {
            parameter: bool(group.get("fused") or group.get("capturable"))
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def of(self, parameter: nn.Parameter, state: Tensor) -> torch.device:
        """The device of one tensor of a parameter's state."""
        beside = state.ndim > 0 or self._near.get(parameter, False)
        return parameter.device if beside else torch.device("cpu")


def count(named: Named) -> int:
    """Elements of all parameters."""
    return sum(parameter.numel() for parameter in named.values())


def item(named: Named) -> int:
    """Bytes of one element."""
    return next(iter(named.values())).element_size()
