"""The replica: trainable parameters that are whole, plain and bit-identical on every rank.

They lie in one flat buffer, their gradients in another (`flat_buffers.py`), so that an optimizer
step needs one reduction whatever the accumulation, one clip and one checksum. The gradients are
reduced together with one slot per tensor for its presence, the number of ranks that had a gradient
for it: a tensor without one anywhere has `grad is None`, so that an optimizer skips it. Scalars
that a step wants summed (loss, tokens, flags) are in the same reduction. The state strategy
(`optimizer_state.py`) decides how the sum is made, and which rank's optimizer steps what.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dlora.errors import UsageError
from dlora.sharding.comm_bytes import WireCounter
from dlora.sharding.replica.audit import unhealed
from dlora.sharding.replica.flat_buffers import FlatBuffers
from dlora.sharding.replica.forgotten_reduction import StepGuard
from dlora.sharding.replica.hierarchical_reduce import Reduction
from dlora.sharding.replica.optimizer_state import (
    Named,
    ReplicaError,
    StateStrategy,
    count,
)
from dlora.sharding.replica.reducing import Reducing
from dlora.sharding.replica.resize import Cuts, cut_states, cut_values, put_states, replace_data
from dlora.sharding.replica.strategies import strategy_class
from dlora.sharding.topology import Topology


class Replica(Reducing):
    """Owns the trainable parameters of a model, on every engine with the same code.

    Args:
        topology: ranks and nodes; its world may be 1, and then there are no collectives.
        divided: whether the optimizer state is divided over ranks.
        reduce_dtype: in which gradients are sent, and summed in their own; None: their own.
        reduction: of another replica of the same ranks, whose process groups this one uses.

    Attributes:
        strategy: how the optimizer state is distributed, once there are parameters.
        present: whether each parameter had a gradient on some rank, as of the last reduction.
        healed: called with a line on the tensors that an audit has repaired; None: an audit that
            finds a difference raises.
        wire: counts the bytes that this rank's collectives send.
    """

    strategy: StateStrategy

    def __init__(
        self,
        topology: Topology,
        wire: WireCounter | None = None,
        *,
        divided: bool = False,
        reduce_dtype: torch.dtype | None = None,
        reduction: Reduction | None = None,
    ) -> None:
        self.topology, self.divided = topology, divided
        self.wire = wire or WireCounter()
        self._reduction = reduction or Reduction(topology, self.wire, reduce_dtype)
        self.named: dict[str, nn.Parameter] = {}
        self.healed: Callable[[str], None] | None = None
        self.reductions = 0  # made so far; every `AUDIT_EVERY`th ends with an audit
        self.unreduced = False  # whether a backward pass came since the last one
        self._guard: StepGuard | None = None

    def own(self, named: Named, *, equal: bool = False) -> None:
        """Take over parameters; collective: rank 0's values are broadcast.

        Args:
            named: trainable parameters by name, in the same order on every rank; all of one dtype,
                on one device.
            equal: every rank has the same values already, so nothing is sent.
        """
        self.named = dict(named)
        strategy = strategy_class(self.divided, self.topology.world)
        self.strategy = strategy(self.named, self._reduction)
        self._allocate()
        self.present = dict.fromkeys(self.named, False)
        weak = weakref.ref(self)  # Python's collector does not see what a tensor's hooks refer to
        for name, parameter in self.named.items():
            hook = functools.partial(_after_backward, weak, name)
            parameter.register_post_accumulate_grad_hook(hook)
        if self.topology.world > 1:
            if not equal:
                dist.broadcast(self._buffers.values, src=0)
            self._guard = self._guard or StepGuard(self)

    def disown(self) -> None:
        """Own nothing, as at first."""
        self.named, self.unreduced, self._guard = {}, False, None
        del self.strategy, self._buffers

    @property
    def values(self) -> Tensor:
        """[numel] the flat values; each parameter is a view of them."""
        return self._buffers.values[: self.numel]

    @property
    def optimized(self) -> dict[str, nn.Parameter]:
        """What an optimizer works on: the parameters, or 1-D parts of them where it is divided."""
        return self.strategy.optimized if self.named else {}

    def attach_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Connect the optimizer that works on `optimized`; returns it. Call it once.

        Where its state is divided, a step is collective from now on: it ends with gathering the
        values, so that every rank has them whole. The same holds for an optimizer that works in
        units (`owned_state.InUnits`), each of which one rank steps. For others nothing changes.
        """
        self.strategy.attach_optimizer(optimizer, lambda: self._buffers.check())
        return optimizer

    def drive(self, optimizer: Optimizer) -> Optimizer:
        """The earlier name of `attach_optimizer`."""
        return self.attach_optimizer(optimizer)

    @torch.no_grad()
    def resize(self, cuts: Cuts, optimizer: Optimizer | None = None) -> None:
        """Keep some rows or columns of parameters and delete the others, and all gradients.

        The `Parameter` objects stay; an optimizer's state of each element is cut alike. Every rank
        must pass the same cuts; it is collective where the optimizer state is divided.

        Args:
            cuts: by name, a dim and the indices along it that stay.
        """
        self._buffers.check()
        values = cut_values(self.named, cuts)
        if optimizer:
            states = cut_states(self.strategy, self._reduction, self.named, cuts, optimizer)
        for name, value in values.items():
            replace_data(self.named[name], value)
        self.strategy.rebuild_layout()
        self._allocate()
        if optimizer:
            put_states(states, optimizer, self.strategy.optimized)

    # -- one optimizer step ---------------------------------------------------------------------

    def clip(self, max_norm: float, norm: float | None = None) -> Tensor | float:
        """Scale all gradients so that their global 2-norm is at most `max_norm`.

        Args:
            norm: theirs, if it is known (`Reduced.norm`) and they were not changed since.

        Returns:
            The norm before clipping.

        Raises:
            UsageError: a backward pass came since the last `reduce_gradients`.
        """
        if not self.named:
            raise ReplicaError("there is nothing to clip: attach adapters first")
        if self.unreduced:
            raise UsageError(
                "replica.clip would clip this rank's own gradients: call "
                "replica.reduce_gradients() before it"
            )
        if norm is None:
            found = self.gradient_norm()
            self.strategy.scale_((1 / (found + 1e-6) * max_norm).clamp(max=1.0))
            return found
        r = self._rounded  # each operation, so that the factor has the bits that tensors would give
        factor = r(r(1 / r(r(norm) + r(1e-6))) * r(max_norm))
        if not factor >= 1:
            self.strategy.scale_(factor)
        return norm

    def gradient_norm(self) -> Tensor:
        """Global 2-norm of the reduced gradients, accumulated in float64.

        float64 because the last bit must not depend on how a rank's hardware orders the sum.
        """
        return self.strategy.norm().to(self.values.dtype)

    def zero_grad(self) -> None:
        """Remove all gradients; `optimizer.zero_grad()` does as well."""
        self.unreduced = False
        self._buffers.zero_(self.numel)
        self.strategy.zero_grad()

    def gradient(self, name: str) -> Tensor:
        """This rank's gradient of a parameter, to be added to before the reduction.

        It counts as present from then on, and is zero where there was none.
        """
        return self._buffers.gradient(name)

    @property
    def gradients(self) -> Tensor:
        """The flat gradients that this rank's optimizer uses: [numel], or its part of them."""
        return self.strategy.gradients

    # -- guarding the promise -------------------------------------------------------------------

    def audit(self) -> None:
        """Compare a checksum of every tensor over all ranks; 8 bytes per rank unless they differ.

        With `healed` set, tensors that differ are set to what most ranks have, and it is called.

        Raises:
            ReplicaError: on every rank, naming the tensors and the ranks that differ.
        """
        found = unhealed(self.named, self.topology.world, self.wire, self.healed)
        if found:
            raise ReplicaError(f"the adapters are no longer the same on every rank: {found}")

    @property
    def reduction(self) -> Reduction:
        """The process groups that it sends through."""
        return self._reduction

    @property
    def buffers(self) -> FlatBuffers:
        """The flat buffers of values and gradients."""
        return self._buffers

    def _allocate(self) -> None:
        """Buffers for the parameters as they are, and the parameters in them."""
        self.numel = count(self.named)
        lengths = self.strategy.lengths(self.named, self.topology)
        self._buffers = FlatBuffers(self.named, lengths, self.strategy.attach_buffers)


def _after_backward(weak: weakref.ref[Replica], name: str, parameter: nn.Parameter) -> None:
    """Torch's hook: a backward pass has accumulated a gradient."""
    if (replica := weak()) is not None:
        replica.unreduced = True
        replica._buffers.after_backward(name, parameter)
