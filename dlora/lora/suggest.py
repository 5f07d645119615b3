"""What a name that is not there may have meant: names of the same kind, and why one is of another.

A module that can be adapted is suggested for `target_modules`, a module with parameters for
`modules_to_save`, a matrix for `target_parameters`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn

_SHOWN = 12


def suggestion(name: str, paths: Iterable[str]) -> str:
    """'; did you mean …' with the nearest last components, or a few that exist."""
    tails = _tails(paths)
    near = difflib.get_close_matches(_tail(name), tails, n=3)
    if near:
        return f"; did you mean {', '.join(near)}?"
    return f"; names in this model: {', '.join(tails[:_SHOWN])}" if tails else ""


def why_not(name: str, model: nn.Module, *, wanted: str) -> str:
    """': it is …' where the model has something else of that name; else an empty text.

    Args:
        wanted: `"module"` or `"parameter"`, whichever the name should have been of.
    """
    ends = (name, f".{name}")
    if wanted == "parameter":
        for path, module in model.named_modules():
            if path and (path == name or path.endswith(ends[1])):
                own = [f"{_tail(path)}.{key}" for key, p in module.named_parameters(recurse=False)]
                named = f" (or {own[0]} here)" if own and own[0].endswith(".weight") else ""
                return f": {path} is a module; name it in target_modules{named}"
        return ""
    for path, parameter in model.named_parameters():
        if path == name or path.endswith(ends[1]):
            return f": {path} is {_kind(parameter)}, not a module{_instead(path, parameter)}"
    tail = _tail(name)
    for path, parameter in model.named_parameters():
        if _dims(parameter) == 3 and tail in _fused(_tail(path)):
            return (
                f": {tail} is a part of {path}, {_kind(parameter)}, not a module"
                f"{_instead(path, parameter)}"
            )
    return ""


def parameter_name(path: str) -> str:
    """A short name for `target_parameters`: the parameter and the module that has it."""
    return ".".join(path.split(".")[-2:])


def _kind(parameter: nn.Parameter) -> str:
    dims = _dims(parameter)
    if dims == 3:
        return "the stacked weights of experts, a parameter"
    return "a parameter" if dims == 2 else f"a parameter of {dims} dim(s)"


def _instead(path: str, parameter: nn.Parameter) -> str:
    if _dims(parameter) not in (2, 3):
        return ""
    return f"; use target_parameters: [{parameter_name(path)}]"


def _fused(tail: str) -> set[str]:
    """Names that transformers joined in one parameter: `gate_up_proj` is gate_proj and up_proj."""
    if tail == "gate_up_proj":
        return {"gate_proj", "up_proj", "w1", "w3", "linear_fc1"}
    return {"w2", "linear_fc2"} if tail == "down_proj" else set()


def _dims(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _tail(path: str) -> str:
    return path.rpartition(".")[2]


def _tails(paths: Iterable[str]) -> list[str]:
    tails = dict.fromkeys(_tail(path) for path in paths)
    return [tail for tail in tails if not tail.isdigit()]
