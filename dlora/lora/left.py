"""What the targets leave alone, or name in vain, in lines for the user."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from dlora.errors import and_more
from dlora.lora.config import LoraConfig
from dlora.lora.layers import CONVOLUTIONS
from dlora.lora.parameters import shape_of
from dlora.lora.suggest import parameter_name
from dlora.lora.targets import ALL_LINEAR, Passed, passed_over
from dlora.lora.text_part import reached_by_text, text_part


def what_is_left(
    model: nn.Module, config: LoraConfig, adapted: Collection[str], parameters: Collection[str]
) -> list[str]:
    """A line for each kind of weights that a user may miss among the trained ones.

    Args:
        adapted, parameters: paths of the modules and of the parameters that are adapted.
    """
    if config.target_modules != ALL_LINEAR:
        return list(_in_vain(model, adapted))
    lines = []
    passed = passed_over(model)
    if others := [path for path, why in passed.items() if why is Passed.OTHER_INPUT]:
        lines.append(
            f"target_modules: all-linear adapts the text part alone ({text_part(model)}); "
            f"{len(others)} linear layers elsewhere are left alone ({_roots(others)}); name them "
            "to adapt them"
        )
    if read := {path: why for path, why in passed.items() if isinstance(why, str)}:
        readers = dict.fromkeys(read.values())
        lines.append(
            f"target_modules: all-linear leaves {len(read)} linear layers alone ({_tails(read)}): "
            f"{and_more(list(readers))} reads their weight itself, past an adapter"
        )
    if odd := [path for path, why in passed.items() if why is Passed.OTHER_RESULT]:
        kinds = dict.fromkeys(type(model.get_submodule(path)).__name__ for path in odd)
        lines.append(
            f"target_modules: all-linear leaves {len(odd)} modules alone ({_tails(odd)}): "
            f"{and_more(list(kinds))} computes something else than the linear layer that it is "
            "derived from"
        )
    stacks = dict(_stacks(model))
    if stacks and not parameters:
        total = sum(_numel(parameter) for parameter in model.parameters())
        count = sum(map(_numel, stacks.values()))
        names = dict.fromkeys(map(parameter_name, stacks))
        lines.append(
            f"target_modules: all-linear leaves stacked weights of experts alone, {count:,} of "
            f"{total:,} parameters; target_parameters: [{', '.join(names)}] adapts them"
        )
    return lines


def unreached_by_text(model: nn.Module, adapted: Collection[str]) -> list[str]:
    """The adapted modules that text alone never gets to, of a model that takes images as well."""
    part = text_part(model)
    return [path for path in adapted if not reached_by_text(model, path, part)]


def _in_vain(model: nn.Module, adapted: Collection[str]) -> Iterator[str]:
    if outside := unreached_by_text(model, adapted):
        yield (
            f"target_modules: {len(outside)} of {len(adapted)} adapted modules are outside the "
            f"text part ({_roots(outside)}); text alone does not reach them, and leaves them as "
            "they are"
        )


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Stacks of matrices: parameters [E, p, q] that are no kernels of a convolution."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            shape = shape_of(parameter)
            if len(shape) == 3 and min(shape) > 1 and not isinstance(module, CONVOLUTIONS):
                yield f"{path}.{name}", parameter


def _numel(parameter: Any) -> int:
    count = 1
    for size in shape_of(parameter):
        count *= size
    return count


def _roots(paths: Collection[str]) -> str:
    """The parts of the model that the paths are in."""
    return and_more(list(dict.fromkeys(".".join(path.split(".")[:2]) for path in paths)))


def _tails(paths: Collection[str]) -> str:
    return and_more(list(dict.fromkeys(path.rpartition(".")[2] for path in paths)))
