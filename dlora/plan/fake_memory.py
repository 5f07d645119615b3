"""Counts what a pass over fake tensors would take: bytes alive, and floating-point operations."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten: Any = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Inside, every storage counts from the operation that makes it until it is freed.

    Under a `FakeTensorMode` no operation computes anything, and all of them follow shapes and
    lifetimes exactly, autograd's and activation checkpointing's included. What depends on values is
    taken at its worst: `nonzero` finds every element, but of a tensor given to `mark`.

    Args:
        known: tensors that are there anyway, and do not count.

    Attributes:
        now: bytes alive.
        peaks: most bytes alive, by the phase in which they were.
        flops: multiplications and additions of all matrix products, as torch's `FlopCounterMode`
            counts them, but half of those under a fused causal mask.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = [tensor.untyped_storage() for tensor in known]  # alive, so no key is reused
        self._sizes = {storage._cdata: 0 for storage in self._known}
        self._targets: dict[int, int] = {}
        self._phase = ""
        self.now, self.flops = 0, 0
        self.peaks = {"": 0}

    def mark(self, tensor: Tensor, count: int) -> Tensor:
        """From now on, `count` elements of `tensor` are unequal to what it is compared with."""
        self._known.append(tensor.untyped_storage())  # alive, so that no other one has its key
        self._targets[self._known[-1]._cdata] = count
        return tensor

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, peaks belong to `name`."""
        previous, self._phase = self._phase, name
        self.peaks.setdefault(name, self.now)
        try:
            yield
        finally:
            self._phase = previous

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.nonzero.default:
            found = self._targets.get(args[0].untyped_storage()._cdata, args[0].numel())
            result = args[0].new_empty((found, args[0].ndim), dtype=torch.int64)
        elif func is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # torch knows the shape of it in bfloat16 alone, but computes it in any dtype.
            result = args[0].new_empty(_grouped_shape(*args, **kwargs))
        else:
            result = func(*args, **kwargs)
        if func is aten.ne.Scalar and args[0].untyped_storage()._cdata in self._targets:
            self.mark(result, self._targets[args[0].untyped_storage()._cdata])
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peaks[self._phase] = max(self.peaks[self._phase], self.now)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _fused_on_cpu(count: Callable[..., int], causal: int) -> Callable[..., int]:
    """`count`, halved if the argument number `causal` is true: half of the scores are masked.

    Fused kernels skip those, and the figure is to bound the time from below.
    """

    def halved(*args: Any, **kwargs: Any) -> int:
        is_causal = args[causal] if len(args) > causal else kwargs.get("is_causal", False)
        return count(*args, **kwargs) // (2 if is_causal else 1)

    return halved


def _grouped(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """a [T, K] and b [groups, K, N], whose groups divide T; or a [M, T], b [T, N]: gradients."""
    return 2 * a.shape[-2:].numel() * b.shape[-1]


def _grouped_shape(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Any:
    """The shape of the product: groups divide a dim of a, of b or of both, or none."""
    if a.ndim == b.ndim == 2:
        assert offs is not None  # both are divided along what is summed
        return (len(offs), a.shape[0], b.shape[1])
    return (*a.shape[:-1], b.shape[-1]) if b.ndim == 3 else (a.shape[1], b.shape[1])


# torch's own counts, and those of what it has none for.
_FLOPS = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten._grouped_mm: _grouped,
    aten._scaled_dot_product_flash_attention_for_cpu: _fused_on_cpu(
        flop_registry[aten._scaled_dot_product_flash_attention], causal=4
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_on_cpu(
        flop_registry[aten._scaled_dot_product_flash_attention_backward], causal=7
    ),
}
