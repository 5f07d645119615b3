"""Counts the operators that torch dispatches."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Views and memory: no kernel runs.
FREE = {
    "view", "_unsafe_view", "t", "transpose", "detach", "alias", "expand", "reshape", "slice",
    "unsqueeze", "device", "new_empty", "empty", "empty_like", "new_empty_strided", "permute",
    "select",
}  # fmt: skip


class Calls(TorchDispatchMode):
    """Inside, `calls[name]` counts an operator, such as `aten.addmm.default`."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def __getitem__(self, name: str) -> int:
        return self.counted[name]
