"""Flat buffers in which parameters and their gradients are laid end to end.

values     [ p0 | p1 | p2 | … ]     parameters are views of it
gradients  [ g0 | g1 | g2 | … ]     gradients are views of it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dlora.errors import UsageError
from dlora.sharding.replica.optimizer_state import Named, ReplicaError
from dlora.sharding.replica.step_scalars import Scalar


class FlatBuffers:
    """Binds parameters to views of the buffers, however they are moved or get their gradients.

    Args:
        named: parameters of one dtype, on one device.
        lengths: elements of the two buffers, at least the parameters' own.
        on_bind: called with (values, gradients, views of the gradients by name) now and whenever
            the buffers have moved.

    Attributes:
        present: whether this rank is known to have a gradient of each parameter since `zero_`.

    Raises:
        ReplicaError: there is no parameter, or they differ in dtype or device.
    """

    def __init__(
        self,
        named: Named,
        lengths: tuple[int, int],
        on_bind: Callable[[Tensor, Tensor, Mapping[str, Tensor]], None],
    ) -> None:
        dtype, device = common_kind(named)
        self._named, self._on_bind = named, on_bind
        self.values, self.gradients = (torch.zeros(n, dtype=dtype, device=device) for n in lengths)
        self.present = dict.fromkeys(named, False)
        self._gradient_views: dict[str, Tensor] = {}
        self._bind()

    def check(self) -> None:
        """Bind parameters again that `model.to(device)` moved away.

        Raises:
            ReplicaError: their dtype was changed.
            UsageError: DeepSpeed has partitioned them.
        """
        if all(is_same_place(p, self._value_views[n]) for n, p in self._named.items()):
            return
        if any(hasattr(parameter, "ds_id") for parameter in self._named.values()):
            raise UsageError(
                "the adapters were partitioned by a DeepSpeed engine that was made after "
                "dlora.shard; initialise it over the frozen base first, without an optimizer "
                "section, then attach and shard"
            )
        dtype, device = common_kind(self._named)
        if dtype != self.values.dtype:
            raise ReplicaError(
                f"the adapters were cast from {self.values.dtype} to {dtype}; cast the base only, "
                "before dlora.attach"
            )
        gradients = {n: p.grad for n, p in self._named.items()}
        self.values = torch.zeros_like(self.values, device=device)
        self.gradients = self.gradients.to(device, copy=True)
        self._bind()
        for name, gradient in gradients.items():
            if gradient is not None:
                self._take(name, gradient)

    def after_backward(self, name: str, parameter: nn.Parameter) -> None:
        """After autograd accumulated a gradient: move it into the buffer, and mark it present."""
        if not is_same_place(parameter, self._value_views[name]):
            self.check()
        if parameter.grad is not None:
            self._take(name, parameter.grad)
        self.present[name] = True

    def gradient(self, name: str) -> Tensor:
        """The gradient of a parameter, to be added to; present from now on, zero if it was not."""
        parameter = self._named[name]
        if not is_same_place(parameter, self._value_views[name]):
            self.check()
        view = self._gradient_views[name]
        if parameter.grad is None:
            parameter.grad = view.zero_()
        else:
            self._take(name, parameter.grad)
        self.present[name] = True
        return view

    def collect(self, is_zero: Callable[[str], bool]) -> list[Scalar]:
        """Copy gradients that were set by hand into the buffer, and zero those that are absent.

        Args:
            is_zero: whether a parameter without `.grad` counts as one whose gradient is zero.

        Returns:
            Of each parameter, whether this rank has a gradient: 0 or 1.
        """
        found: list[Scalar] = []
        for name, parameter in self._named.items():
            view = self._gradient_views[name]
            if parameter.grad is None:
                view.zero_()
                self.present[name] = is_zero(name)
            elif not is_same_place(parameter.grad, view):
                view.copy_(parameter.grad)
                self.present[name] = True
            elif not self.present[name]:
                # No backward pass came by, yet the view may have been written to.
                found.append(view.any())
                continue
            found.append(float(self.present[name]))
        return found

    def lie_in(self, place: Tensor) -> None:
        """Move the gradients into `place`, a part of another tensor, of their length."""
        place.copy_(self.gradients)
        views = _views(place, self._named)
        for name, parameter in self._named.items():
            gradient = parameter.grad
            if gradient is not None and is_same_place(gradient, self._gradient_views[name]):
                parameter.grad = views[name]
        self.gradients = place
        self._gradient_views = views
        self._on_bind(self.values, place, views)

    def zero_(self, numel: int) -> None:
        """Every gradient, the first `numel` elements, becomes zero and absent."""
        self.check()  # `.to()` moves gradients too, out of the buffer
        self.gradients[:numel].zero_()
        for name, parameter in self._named.items():
            parameter.grad = self._gradient_views[name]
            self.present[name] = False

    def _bind(self) -> None:
        """Make parameters views of `values`, and prepare the views for gradients."""
        self._value_views = _views(self.values, self._named)
        self._gradient_views = _views(self.gradients, self._named)
        self._on_bind(self.values, self.gradients, self._gradient_views)
        for name, parameter in self._named.items():
            self._value_views[name].copy_(parameter.detach())
            parameter.data = self._value_views[name]
            parameter.grad = None

    def _take(self, name: str, gradient: Tensor) -> None:
        """Make `.grad` the view of the buffer, with this gradient in it."""
        view = self._gradient_views[name]
        if not is_same_place(gradient, view):
            view.copy_(gradient)
            self._named[name].grad = view


def is_same_place(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a buffer's parts begin at the same element of the same storage."""
    return (
        one.storage_offset() == other.storage_offset()
        and one.untyped_storage()._cdata == other.untyped_storage()._cdata
    )


def common_kind(named: Mapping[str, Tensor]) -> tuple[torch.dtype, torch.device]:
    """The one dtype and device of all parameters.

    Raises:
        ReplicaError: there are none, or they differ.
    """
    if not named:
        raise ReplicaError("there is nothing to train: no parameter requires a gradient")
    kinds = {(p.dtype, p.device) for p in named.values()}
    if len(kinds) > 1:
        listed = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ReplicaError(f"trainable parameters must share one dtype and device, not {listed}")
    return next(iter(kinds))


def _views(flat: Tensor, named: Named) -> dict[str, Tensor]:
    """Views of a flat tensor in the shapes of parameters that are laid end to end in it."""
    lengths = [parameter.numel() for parameter in named.values()]
    parts = flat[: sum(lengths)].split(lengths)
    return {name: part.view(named[name].shape) for name, part in zip(named, parts, strict=True)}
