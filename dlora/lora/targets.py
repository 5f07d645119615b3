"""Which modules and parameters a configuration means: PEFT's rules, and errors with candidates."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any

from torch import nn

from dlora.errors import UsageError
from dlora.lora.choice import chosen
from dlora.lora.config import LoraConfig
from dlora.lora.layers import AdaptedConv1D, AdaptedLinear, layer_kind
from dlora.lora.names import of_base
from dlora.lora.obstacles import obstacle, statistics_in
from dlora.lora.parameters import check_parameter, shape_of
from dlora.lora.suggest import suggestion, why_not
from dlora.lora.tasks import head_names
from dlora.lora.text_part import reached_by_text, text_part
from dlora.lora.weight_reads import weight_reads

ALL_LINEAR = "all-linear"


class Passed(Enum):
    """Why `all-linear` leaves a linear layer alone, beside those whose weight a module reads."""

    OTHER_INPUT = "text alone does not reach it"
    OTHER_RESULT = "its forward computes something else"


@of_base
def target_paths(model: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the modules and then of the parameters that get A and B, in the model's order.

    Raises:
        UsageError: an entry of `target_modules`, `target_parameters` or a pattern matches nothing
            (with `strict_names`), or matches what cannot carry an adapter.
    """
    return [*module_paths(model, config), *parameter_paths(model, config)]


@of_base
def module_paths(model: nn.Module, config: LoraConfig) -> list[str]:
    """The modules among `target_paths`; the errors are the same."""
    modules = {path: module for path, module in model.named_modules() if path}
    saved = set(saved_paths(model, config))
    targets = config.target_modules
    if targets == ALL_LINEAR:
        passed = passed_over(model)
        meant = [p for p in _linear(model) if p not in passed and not _inside(p, saved)]
    else:
        meant = _matching(model, modules, config, saved)
    paths = chosen(meant, config)
    if targets != ALL_LINEAR:
        for path in paths:
            _check_adaptable(path, modules)
        _check_called(model, paths)
    if not paths and not saved and not config.target_parameters:
        what = "module that is not excluded" if meant else "linear layer of this model"
        raise UsageError(f"target_modules: {targets!r} matches no {what}")
    _check_patterns(config, [*paths, *_parameters_named(model, config)])
    return paths


@of_base
def parameter_paths(model: nn.Module, config: LoraConfig) -> list[str]:
    """The parameters among `target_paths`; the errors are the same."""
    paths = _parameters_named(model, config)
    if not paths:
        return []
    adapted, saved = set(module_paths(model, config)), set(saved_paths(model, config))
    for path in paths:
        check_parameter(path, model.get_parameter(path))
        owner = path.rpartition(".")[0]
        if not owner:
            raise UsageError(f"target_parameters: {path} belongs to no module inside the model")
        if _inside(owner, saved):
            raise UsageError(f"target_parameters: modules_to_save trains {path} already")
        if owner in adapted:
            raise UsageError(
                f"target_parameters: target_modules adapts {owner} already; leave one of them out"
            )
    _check_called(model, [path.rpartition(".")[0] for path in paths], "target_parameters")
    return paths


@of_base
def saved_paths(model: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the modules that are trained whole.

    Raises:
        UsageError: a name matches no module, one without parameters, one inside another match, or
            one with running statistics.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    trainable = [p for p, m in modules.items() if any(True for _ in m.parameters())]
    paths: list[str] = []
    for name in (*config.modules_to_save, *head_names(model, config.task_type)):
        matches = [p for p in modules if p.endswith(name)]
        if not matches and not config.strict_names:
            continue
        if not matches:
            why = why_not(name, model, wanted="module").partition("; use")[0]
            raise UsageError(
                f"modules_to_save: {name!r} matches no module{why or suggestion(name, trainable)}"
            )
        matches = [p for p in matches if p in trainable]
        if not matches:
            raise UsageError(f"modules_to_save: {name!r} has no parameters to train")
        paths += matches
    for path in paths:
        if _inside(path.rpartition(".")[0], set(paths)):
            raise UsageError(f"modules_to_save: {path} is inside another module that it matches")
        if (inner := statistics_in(modules[path])) is not None:
            where = f"{path}.{inner}".rstrip(".")
            raise UsageError(
                f"modules_to_save: {where} has running statistics, which would change in the base, "
                "differ from rank to rank and be missing in the adapter"
            )
    return list(dict.fromkeys(paths))


@of_base
def linear_paths(model: nn.Module) -> list[str]:
    """Paths of the linear layers that are called, but for the output head, in the model's order."""
    read = _bypassed(model)
    return [path for path in _linear(model) if path not in read]


@of_base
def passed_over(model: nn.Module) -> dict[str, Passed | str]:
    """{linear layer that `all-linear` leaves alone: why, or the class that reads its weight}."""
    read, part = _bypassed(model), text_part(model)
    passed: dict[str, Passed | str] = {}
    for path in _linear(model):
        if not reached_by_text(model, path, part):
            passed[path] = Passed.OTHER_INPUT
        elif path in read:
            passed[path] = read[path]
    for path in _named_linear(model):
        inside = reached_by_text(model, path, part)
        passed[path] = Passed.OTHER_RESULT if inside else Passed.OTHER_INPUT
    return passed


@of_base
def readers_of_weights(model: nn.Module) -> dict[str, str]:
    """{linear layer: the class that reads its weight past the layer}, but for the output head."""
    read = _bypassed(model)
    return {path: read[path] for path in _linear(model) if path in read}


def _bypassed(model: nn.Module) -> dict[str, str]:
    return {path: read.reader for path, read in weight_reads(model).items() if read.bypasses}


def _linear(model: nn.Module) -> list[str]:
    """Every linear layer but the output head, which PEFT leaves out too."""
    head = _head(model)
    return [
        path
        for path, module in model.named_modules()
        if path and layer_kind(module) in (AdaptedLinear, AdaptedConv1D) and module is not head
    ]


def _named_linear(model: nn.Module) -> list[str]:
    """Modules that are derived from `nn.Linear` and compute something else, as Llama 4's router."""
    head = _head(model)
    return [
        path
        for path, module in model.named_modules()
        if path
        and isinstance(module, nn.Linear)
        and module is not head
        and layer_kind(module) is None
    ]


def _head(model: nn.Module) -> Any:
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def _matching(
    model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig, saved: set[str]
) -> list[str]:
    """What an expression or the names mean; as in PEFT, `modules_to_save` take precedence."""
    targets = config.target_modules
    is_regex = isinstance(targets, str)
    found: set[str] = set()
    for entry in [targets] if isinstance(targets, str) else targets:
        named = f"target_modules: {'the regular expression ' if is_regex else ''}{entry!r}"
        expression = entry if is_regex else rf"(.*\.)?{re.escape(entry)}"
        meant = {p for p in modules if re.fullmatch(expression, p)}
        if not meant and config.strict_names:
            why = "" if is_regex else why_not(entry, model, wanted="module")
            adaptable = [p for p, m in modules.items() if layer_kind(m) is not None]
            raise UsageError(f"{named} matches no module{why or suggestion(entry, adaptable)}")
        if config.strict_names and all(_inside(p, saved) for p in meant):
            raise UsageError(f"{named} matches only modules that modules_to_save trains already")
        found |= meant
    return [p for p in modules if p in found and not _inside(p, saved)]


def _parameters_named(model: nn.Module, config: LoraConfig) -> list[str]:
    """What the names of `target_parameters` mean, in the model's order."""
    if not config.target_parameters:
        return []
    named = [path for path, _ in model.named_parameters(remove_duplicate=False)]
    found: set[str] = set()
    for name in config.target_parameters:
        meant = {path for path in named if path == name or path.endswith(f".{name}")}
        if not meant and config.strict_names:
            why = why_not(name, model, wanted="parameter")
            stacks = [p for p in named if len(shape_of(model.get_parameter(p))) == 3]
            others = [p for p in named if len(shape_of(model.get_parameter(p))) == 2]
            raise UsageError(
                f"target_parameters: {name!r} matches no parameter"
                f"{why or suggestion(name, stacks or others)}"
            )
        found |= meant
    return [path for path in named if path in found]


def _check_patterns(config: LoraConfig, paths: list[str]) -> None:
    for key, pattern in (
        ("rank_pattern", config.rank_pattern),
        ("alpha_pattern", config.alpha_pattern),
    ):
        for expression in pattern if config.strict_names else ():
            if not any(re.match(rf"(.*\.)?({expression})$", path) for path in paths):
                raise UsageError(
                    f"{key}: {expression!r} matches none of the {len(paths)} adapted modules"
                    f"{suggestion(expression, paths)}"
                )


def _check_adaptable(path: str, modules: dict[str, nn.Module]) -> None:
    module = modules[path]
    if layer_kind(module) is not None:
        return
    stacks = [
        name
        for name, parameter in module.named_parameters(recurse=False)
        if len(shape_of(parameter)) == 3
    ]
    last = path.rpartition(".")[2]
    known = obstacle(module, last)
    why = known or "Linear, Conv1D, Embedding and Conv1d, 2d, 3d can"
    if stacks and known is None:
        why = (
            "its weights are stacks of matrices: use target_parameters: "
            f"[{', '.join(f'{last}.{name}' for name in stacks)}]"
        )
    elif known is None and isinstance(module, (nn.Linear, nn.Embedding)):
        why = "its forward computes something else than the layer that it is derived from"
    raise UsageError(
        f"target_modules: {path} is a {type(module).__name__}, which cannot carry an adapter "
        f"({why})"
    )


def _check_called(model: nn.Module, paths: list[str], key: str = "target_modules") -> None:
    """Raise a `UsageError` about a layer that is never called, so that an adapter cannot act."""
    read = weight_reads(model)
    for path in paths:
        if path in read and not read[path].called:
            raise UsageError(
                f"{key}: {path} would have no effect: {read[path].reader} reads the weight itself "
                "and never calls the layer, and with it the adapter"
            )


def _inside(path: str, roots: set[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)
