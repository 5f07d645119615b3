"""Which modules a configuration means: PEFT's matching rules, and errors that name candidates."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn

from dlora.errors import UsageError
from dlora.lora.config import LoraConfig
from dlora.lora.layers import AdaptedConv1D, AdaptedLinear, layer_kind, obstacle


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
        paths = _matching(modules, targets, saved)
        for path in paths:
            _check_adaptable(path, modules)
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
    """Paths of the modules that are trained whole.

    Raises:
        UsageError: a name matches no module, one without parameters, or one inside another match.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    paths: list[str] = []
    for name in config.modules_to_save:
        matches = [p for p in modules if p.endswith(name)]
        if not matches:
            raise UsageError(
                f"modules_to_save: {name!r} matches no module{_candidates(name, modules)}"
            )
        matches = [p for p in matches if any(True for _ in modules[p].parameters())]
        if not matches:
            raise UsageError(f"modules_to_save: {name!r} has no parameters to train")
        paths += matches
    for path in paths:
        if _inside(path.rpartition(".")[0], set(paths)):
            raise UsageError(f"modules_to_save: {path} is inside another module that it matches")
    return list(dict.fromkeys(paths))


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of the linear layers but for the output head, in the model's order."""
    return _all_linear(model, {path: module for path, module in model.named_modules() if path})


def _all_linear(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Every linear layer but the output head, which PEFT leaves out too."""
    head = _output_head(model)
    return [
        path
        for path, module in modules.items()
        if layer_kind(module) in (AdaptedLinear, AdaptedConv1D)
        and module is not head
        and not _in_attention_kernel(path, modules)
    ]


def _output_head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def _matching(
    modules: dict[str, nn.Module], targets: str | Iterable[str], saved: set[str]
) -> list[str]:
    """What an expression or the names mean; as in PEFT, `modules_to_save` take precedence."""
    is_regex = isinstance(targets, str)
    found: set[str] = set()
    for entry in [targets] if isinstance(targets, str) else targets:
        named = f"target_modules: {'the regular expression ' if is_regex else ''}{entry!r}"
        expression = entry if is_regex else rf"(.*\.)?{re.escape(entry)}"
        meant = {p for p in modules if re.fullmatch(expression, p)}
        if not meant:
            raise UsageError(f"{named} matches no module{_candidates(entry, modules)}")
        if all(_inside(p, saved) for p in meant):
            raise UsageError(f"{named} matches only modules that modules_to_save trains already")
        found |= meant
    return [p for p in modules if p in found and not _inside(p, saved)]


def _check_adaptable(path: str, modules: dict[str, nn.Module]) -> None:
    module = modules[path]
    if layer_kind(module) is None:
        why = (
            obstacle(module)
            or "Linear, Conv1D, Embedding and Conv1d, 2d, 3d can, with their own forward"
        )
        raise UsageError(
            f"target_modules: {path} is a {type(module).__name__}, which cannot carry an adapter "
            f"({why})"
        )
    if _in_attention_kernel(path, modules):
        raise UsageError(
            f"target_modules: {path} belongs to a MultiheadAttention, which reads the weight "
            "itself and would never call the adapter"
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
    return f"; names in this model: {', '.join(tails[:12])}" if tails else ""
