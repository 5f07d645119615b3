"""Which modules a configuration means: PEFT's matching rules, and errors that name candidates."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn

from dlora.errors import UsageError
from dlora.lora.config import LoraConfig
from dlora.lora.hosts import Conv1DHost, LinearHost, host_kind


def target_paths(model: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the modules that get A and B, in the model's order.

    Raises:
        UsageError: an entry of `target_modules` or a pattern matches nothing, or matches a module
            that cannot carry an adapter.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    saved = set(saved_paths(model, config))
    targets = config.target_modules
    if targets == "all-linear":
        paths = [p for p in _all_linear(model, modules) if not _inside(p, saved)]
    else:
        paths = _matching(modules, targets)
        for path in paths:
            _check_can_host(path, modules)
            if _inside(path, saved):
                raise UsageError(f"target_modules: {path} is also named by modules_to_save")
    if not paths and not saved:
        raise UsageError(f"target_modules: {targets!r} matches no linear layer of this model")
    for key, pattern in (
        ("rank_pattern", config.rank_pattern),
        ("alpha_pattern", config.alpha_pattern),
    ):
        for expression in pattern:
            if not any(re.match(rf"(.*\.)?({expression})$", path) for path in paths):
                raise UsageError(
                    f"{key}: {expression!r} matches none of the {len(paths)} adapted modules"
                    f"{_candidates(expression, paths)}"
                )
    return paths


def saved_paths(model: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the modules that are trained whole."""
    modules = {path: module for path, module in model.named_modules() if path}
    paths = []
    for name in config.modules_to_save:
        matches = [p for p in modules if p == name or p.endswith(f".{name}")]
        if not matches:
            raise UsageError(
                f"modules_to_save: {name!r} matches no module{_candidates(name, modules)}"
            )
        paths += [p for p in matches if any(True for _ in modules[p].parameters())]
        if not paths:
            raise UsageError(f"modules_to_save: {name!r} has no parameters to train")
    return list(dict.fromkeys(paths))


def _all_linear(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Every linear layer but the output head, which PEFT leaves out too."""
    head = _output_head(model)
    return [
        path
        for path, module in modules.items()
        if host_kind(module) in (LinearHost, Conv1DHost)
        and module is not head
        and not _in_attention_kernel(path, modules)
    ]


def _output_head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def _matching(modules: dict[str, nn.Module], targets: str | Iterable[str]) -> list[str]:
    if isinstance(targets, str):
        paths = [p for p in modules if re.fullmatch(targets, p)]
        if not paths:
            raise UsageError(
                f"target_modules: the regular expression {targets!r} matches no module"
                f"{_candidates(targets, modules)}"
            )
        return paths
    found = set()
    for name in targets:
        matches = {p for p in modules if p == name or p.endswith(f".{name}")}
        if not matches:
            raise UsageError(
                f"target_modules: {name!r} matches no module{_candidates(name, modules)}"
            )
        found |= matches
    return [p for p in modules if p in found]


def _check_can_host(path: str, modules: dict[str, nn.Module]) -> None:
    module = modules[path]
    if host_kind(module) is None:
        raise UsageError(
            f"target_modules: {path} is a {type(module).__name__}, which cannot carry an adapter "
            "(Linear, Conv1D and Embedding with their own forward can)"
        )
    if _in_attention_kernel(path, modules):
        raise UsageError(
            f"target_modules: {path} belongs to a MultiheadAttention, which reads the weight itself "
            "and would never call the adapter"
        )


def _in_attention_kernel(path: str, modules: dict[str, nn.Module]) -> bool:
    return isinstance(modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)


def _inside(path: str, roots: set[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def _candidates(name: str, paths: Iterable[str]) -> str:
    """'; did you mean …' with the nearest last components, or a few that exist."""
    tails = list(dict.fromkeys(p.rpartition(".")[2] for p in paths))
    tails = [tail for tail in tails if not tail.isdigit()]
    near = difflib.get_close_matches(name.rpartition(".")[2], tails, n=3)
    if near:
        return f"; did you mean {', '.join(near)}?"
    return f"; there are {', '.join(tails[:12])}" if tails else ""
