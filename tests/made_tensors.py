"""What operators make, and what autograd keeps of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Made(TorchDispatchMode):
    """Inside, the operators that run, and the shapes of all tensors that they make anew."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        self.operators.append(str(func))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.shapes.append(tuple(tensor.shape))
        return result

    @property
    def numels(self) -> list[int]:
        return [torch.Size(shape).numel() for shape in self.shapes]


class Allocations(TorchDispatchMode):
    """The elements of every storage that operators make, other than those of `known` tensors."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._made: dict[int, Tensor] = {}  # alive, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                address = tensor.untyped_storage().data_ptr()
                if address not in self._known:
                    self._made.setdefault(address, tensor)
        return result

    def numels(self) -> list[int]:
        sizes = [(t.untyped_storage().nbytes(), t.element_size()) for t in self._made.values()]
        return sorted(nbytes // item for nbytes, item in sizes)


def saved_for_backward(forward: Callable[[], Any], parameters: set[int]) -> list[Tensor]:
    """The distinct tensors, parameters aside, that `forward` keeps for backward."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return list(kept.values())
