"""The replica: trainable parameters that are whole, plain and bit-identical on every rank.

    values  [ p0 | p1 | p2 | … ]            parameters are views of it
    grads   [ g0 | g1 | g2 | … | presence | tail | padding ]   gradients are views of it

One buffer each, so that an optimizer step needs one reduction whatever the accumulation, one clip
and one checksum. `presence` has one slot per tensor, the number of ranks that had a gradient for
it: a tensor without one anywhere keeps `grad is None`, so that an optimizer skips it. Scalars that
a step wants summed (loss, tokens, flags) travel in the tail of the same buffer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlora.sharding.counts import whole_number
from dlora.sharding.mesh import Topology
from dlora.sharding.reduction import Reduction, padded
from dlora.sharding.wire import WireCounter, ring_gather_bytes

AUDIT_EVERY = 10  # optimizer steps between two comparisons of checksums
SUMS = 16  # scalars that may travel with the gradients
_LIMB = 4096  # integers travel as two float32 limbs: sums are exact below 2^36 (single ones: 2^36)


@dataclass(frozen=True)
class Reduced:
    """What travelled with the gradients of one step; the same on every rank.

    Attributes:
        tokens: Σ tokens over ranks; the number of ranks where none were given.
        sums: Σ over ranks of the scalars given.
        each: by rank, the integer that it gave.
    """

    tokens: int
    sums: list[float]
    each: list[int]


class ReplicaError(RuntimeError):
    """The replica is no longer what it promises to be."""


class Replica:
    """Owns the trainable parameters of a model, on every engine with the same code.

    Args:
        topology: ranks and nodes; its world may be 1, and then there are no collectives.

    Attributes:
        values: [numel] flat buffer; each parameter is a view of it.
        wire: counts the bytes that this rank's collectives send.
    """

    def __init__(self, topology: Topology, wire: WireCounter | None = None) -> None:
        self.topology = topology
        self.wire = wire or WireCounter()
        self._reduction = Reduction(topology, self.wire)
        self.named: dict[str, nn.Parameter] = {}
        self.reductions = 0  # made so far; every `AUDIT_EVERY`th ends with an audit

    def own(self, named: Mapping[str, nn.Parameter]) -> None:
        """Take over parameters; collective: rank 0's values are broadcast.

        Args:
            named: trainable parameters by name, in the same order on every rank; all of one dtype,
                on one device.
        """
        self.named = dict(named)
        dtype, device = _common(self.named)
        self.numel = sum(p.numel() for p in self.named.values())
        self.values = torch.empty(self.numel, dtype=dtype, device=device)
        length = buffer_length(self.named, self.topology)
        self._buffer = torch.zeros(length, dtype=dtype, device=device)
        self._present = dict.fromkeys(self.named, False)
        self._bind()
        for name, parameter in self.named.items():
            parameter.register_post_accumulate_grad_hook(functools.partial(self._keep, name))
        if self.topology.world > 1:
            dist.broadcast(self.values, src=0)

    # -- one optimizer step ---------------------------------------------------------------------

    def reduce_gradients(
        self, tokens: int | Tensor | None = None, sums: Sequence[float] = (), each: int = 0
    ) -> Reduced:
        """Replace every gradient by its mean over ranks; one collective, the same bits everywhere.

        Args:
            tokens: with losses summed over this rank's target tokens since the last step, their
                number; gradients then become Σ grad / Σ tokens, the mean over all target tokens of
                all ranks. Without it they become Σ grad / world.
            sums: up to 16 scalars to be summed over ranks along the way.
            each: an integer ≥ 0 (below 2^36) of this rank that all ranks want to see.

        Raises:
            ReplicaError: adapters are missing or were cast, or (every 10th time) they differ
                between ranks; see `audit`.
            UsageError: `tokens` is no whole number.
        """
        if not self.named:
            raise ReplicaError("there is nothing to reduce: attach adapters first")
        if len(sums) > SUMS:
            raise ReplicaError(
                f"{len(sums)} scalars do not fit the {SUMS} slots beside the gradients"
            )
        self._check_bound()
        self._collect()
        rank, world = self.topology.rank, self.topology.world
        count = 1 if tokens is None else whole_number(tokens)
        scalars = [0.0] * (2 + SUMS + 2 * world)
        scalars[:2] = divmod(count, _LIMB)
        scalars[2 : 2 + len(sums)] = sums
        scalars[2 + SUMS + 2 * rank : 4 + SUMS + 2 * rank] = divmod(each, _LIMB)
        extras = self._buffer[self.numel : self.numel + len(self.named) + len(scalars)]
        sent = [*map(float, self._present.values()), *scalars]
        extras.copy_(torch.tensor(sent, dtype=torch.float64))
        self._reduction.sum_(self._buffer)
        received = extras.tolist()
        for (name, parameter), ranks in zip(self.named.items(), received, strict=False):
            parameter.grad = self._gradient_views[name] if ranks > 0 else None
        got = received[len(self.named) :]
        total = _joined(got[:2])
        self.gradients.div_(max(total, 1))
        ranks_sent = got[2 + SUMS :]
        self.reductions += 1
        if self.reductions % AUDIT_EVERY == 0:
            self.audit()
        return Reduced(
            tokens=total,
            sums=got[2 : 2 + len(sums)],
            each=[_joined(ranks_sent[2 * r : 2 * r + 2]) for r in range(world)],
        )

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their global 2-norm is at most `max_norm`.

        Returns:
            The norm before clipping, a scalar; the gradients must have been reduced.
        """
        if not self.named:
            raise ReplicaError("there is nothing to clip: attach adapters first")
        norm = self.gradient_norm()
        self.gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0).to(self.gradients.dtype))
        return norm

    def gradient_norm(self) -> Tensor:
        """Global 2-norm of the reduced gradients, accumulated in float64.

        float64 because the last bit must not depend on how a rank's hardware orders the sum.
        """
        norm = torch.linalg.vector_norm(self.gradients, dtype=torch.float64)
        return norm.to(self.gradients.dtype)

    def zero_grad(self) -> None:
        """Forget all gradients; `optimizer.zero_grad()` does as well."""
        self.gradients.zero_()
        for name, parameter in self.named.items():
            parameter.grad = self._gradient_views[name]
            self._present[name] = False

    @property
    def gradients(self) -> Tensor:
        """[numel] the flat gradients."""
        return self._buffer[: self.numel]

    # -- guarding the promise -------------------------------------------------------------------

    def audit(self) -> None:
        """Compare a checksum of every tensor over all ranks; 8 bytes per rank unless they differ.

        Raises:
            ReplicaError: on every rank, naming the tensors and the ranks that differ.
        """
        if self.topology.world == 1:
            return
        sums = torch.stack([_checksum(p.detach()) for p in self.named.values()])
        total = _checksum(sums)[None]
        totals = total.new_empty(self.topology.world)
        dist.all_gather_single(totals, total)
        self.wire.add(ring_gather_bytes(totals.nbytes, self.topology.world))
        if bool((totals == totals[0]).all()):
            return
        every = sums.new_empty(self.topology.world * len(sums))
        dist.all_gather_single(every, sums)
        raise ReplicaError(_describe_mismatch(list(self.named), every.view(-1, len(sums))))

    # -- the buffers ----------------------------------------------------------------------------

    def _bind(self) -> None:
        """Make parameters views of `values`, and prepare the views for gradients."""
        self._value_views = _views(self.values, self.named)
        self._gradient_views = _views(self._buffer, self.named)
        for name, parameter in self.named.items():
            self._value_views[name].copy_(parameter.detach())
            parameter.data = self._value_views[name]
            parameter.grad = None

    def _check_bound(self) -> None:
        """Re-bind parameters that `model.to(device)` moved away; refuse a changed dtype."""
        if all(
            p.data_ptr() == self._value_views[name].data_ptr() for name, p in self.named.items()
        ):
            return
        dtype, device = _common(self.named)
        if dtype != self.values.dtype:
            raise ReplicaError(
                f"the adapters were cast from {self.values.dtype} to {dtype}; cast the base only, "
                "before dlora.attach"
            )
        held = {n: p.grad for n, p in self.named.items()}
        self.values = torch.empty_like(self.values, device=device)
        self._buffer = torch.zeros_like(self._buffer, device=device)
        self._bind()
        for name, gradient in held.items():
            if gradient is not None:
                self._gradient_views[name].copy_(gradient)
                self.named[name].grad = self._gradient_views[name]

    def _keep(self, name: str, parameter: nn.Parameter) -> None:
        """After autograd accumulated a gradient: it lives in the buffer, and it exists."""
        if parameter.data_ptr() != self._value_views[name].data_ptr():
            self._check_bound()
        view = self._gradient_views[name]
        gradient = parameter.grad
        if gradient is not None and gradient.data_ptr() != view.data_ptr():
            view.copy_(gradient)
            parameter.grad = view
        self._present[name] = True

    def _collect(self) -> None:
        """Bring in gradients that were set by hand, and clear those that are absent."""
        for name, parameter in self.named.items():
            view = self._gradient_views[name]
            if parameter.grad is None:
                self._present[name] = False
            elif parameter.grad.data_ptr() != view.data_ptr():
                view.copy_(parameter.grad)
                self._present[name] = True
            elif not self._present[name]:
                # No backward pass came by, yet the view may have been written to.
                self._present[name] = bool(view.any())
            if not self._present[name]:
                view.zero_()


def buffer_length(named: Mapping[str, nn.Parameter], topology: Topology) -> int:
    """Elements of the gradient buffer: gradients, presence, tail and padding."""
    numel = sum(p.numel() for p in named.values())
    return padded(numel + len(named) + 2 + SUMS + 2 * topology.world, topology)


def _common(named: Mapping[str, nn.Parameter]) -> tuple[torch.dtype, torch.device]:
    if not named:
        raise ReplicaError("there is nothing to train: no parameter requires a gradient")
    kinds = {(p.dtype, p.device) for p in named.values()}
    if len(kinds) > 1:
        listed = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ReplicaError(f"trainable parameters must share one dtype and device, not {listed}")
    return next(iter(kinds))


def _joined(limbs: Sequence[float]) -> int:
    return round(limbs[0]) * _LIMB + round(limbs[1])


def _views(flat: Tensor, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    views, offset = {}, 0
    for name, parameter in named.items():
        views[name] = flat[offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()
    return views


def _checksum(tensor: Tensor) -> Tensor:
    """int64 Σ bits_i · (2i + 1) mod 2^64: one changed word changes it, and so does a swap."""
    words = tensor.contiguous().view(-1).view(torch.int32).to(torch.int64)
    odd = torch.arange(words.numel(), device=words.device, dtype=torch.int64).mul_(2).add_(1)
    return (words * odd).sum()


def _describe_mismatch(names: list[str], every: Tensor) -> str:
    """Name, for each tensor, the ranks that differ from the majority (rank 0 breaks a tie)."""
    found = []
    for index, name in enumerate(names):
        column = every[:, index].tolist()
        if len(set(column)) > 1:
            usual = max(column, key=lambda value: (column.count(value), value == column[0]))
            ranks = [str(rank) for rank, value in enumerate(column) if value != usual]
            found.append(f"{name} on rank {', '.join(ranks)}")
    shown = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
    return f"the adapters are no longer the same on every rank: {shown}"
