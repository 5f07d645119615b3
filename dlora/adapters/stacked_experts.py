"""Adapters of single experts, as before transformers 5 stacked the weights of all of them.

    of one expert e                                  of the stack today
    experts.e.w1, .w3 (gate_proj, up_proj)           experts.gate_up_proj [E, 2m, n]
      A_1, A_3 [r, n], B_1, B_3 [m, r]                 A [E·2r, n], of each e A_1 above A_3
                                                       B [2m, 2r·E] of diag(B_1, B_3)
    experts.e.w2 (down_proj)                         experts.down_proj [E, m, n]

The update of every expert is the same number for number; so PEFT converts such files too.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dlora.adapters.peft_names import PREFIX, wrapped
from dlora.errors import UsageError
from dlora.io.safetensors import StoredTensor
from dlora.lora.config import LoraConfig
from dlora.lora.parameters import shape_of

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(w[123]|gate_proj|up_proj|down_proj)\.lora_([AB])\.")
# The stack that has a projection of single experts, and its place there.
_STACKS = {
    "w1": ("gate_up_proj", 0),
    "gate_proj": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "up_proj": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
    "down_proj": ("down_proj", 0),
}


@dataclass(frozen=True)
class StackedTensor(StoredTensor):
    """A or B of a stack; `parts[e]` are those of expert e, in their places."""

    parts: tuple[tuple[StoredTensor, ...], ...]

    def rows(self, first: int = 0, last: int | None = None) -> Tensor:
        experts = [[part.rows() for part in parts] for parts in self.parts]
        if ".lora_A" in self.key:
            return torch.cat([part for parts in experts for part in parts])[first:last]
        stack_Emr = torch.stack([torch.block_diag(*parts) for parts in experts])
        return stack_Emr.permute(1, 2, 0).flatten(1)[first:last]

    def check_numbers(self) -> None:
        for part in (part for parts in self.parts for part in parts):
            part.check_numbers()


def stack_experts(
    model: nn.Module, config: LoraConfig, tensors: Mapping[str, StoredTensor]
) -> tuple[LoraConfig, dict[str, StoredTensor]]:
    """Settings and tensors of a PEFT file with those of single experts as those of the stack.

    Args:
        tensors: with the names of modules that the model has today.

    Raises:
        UsageError: an expert or a projection is missing, or their ranks differ.
    """
    parameters = dict(model.named_parameters())
    found: dict[str, dict[tuple[str, int, int], StoredTensor]] = {}
    left: dict[str, StoredTensor] = {}
    old = {}  # the path of one expert, by that of the stack
    for key, tensor in tensors.items():
        match = _EXPERT.match(key.removeprefix(PREFIX))
        stack, place = _STACKS[match[3]] if match else ("", 0)
        if match is None or f"{match[1]}.{stack}" not in parameters:
            left[key] = tensor
            continue
        path = f"{match[1]}.{stack}"
        found.setdefault(path, {})[match[4], int(match[2]), place] = tensor
        old[path] = f"{match[1]}.{match[2]}.{match[3]}"
    if not found:
        return config, left
    paths = [name for name in parameters if name in found]
    ranks, alphas = {}, {}
    for path in paths:
        experts = shape_of(parameters[path])[0]
        places = 2 if path.endswith("gate_up_proj") else 1
        for factor in "AB":
            key = f"{PREFIX}{wrapped(paths, path)}.lora_{factor}.weight"
            left[key] = _stacked(key, path, found[path], factor, experts, places)
        pattern, r = re.escape(path), places * config.r_for(old[path])
        ranks[pattern] = r
        alphas[pattern] = config.scaling_for(old[path]) * (math.sqrt(r) if config.use_rslora else r)
    if config.lora_dropout:
        warnings.warn("the experts' lora_dropout is 0: none acts on their stack", stacklevel=4)
    settings: dict[str, Any] = {
        "target_parameters": [*config.target_parameters, *paths],
        "rank_pattern": ranks | config.rank_pattern,
        "alpha_pattern": alphas | config.alpha_pattern,
        "lora_dropout": 0.0,
    }
    return replace(config, **settings), left


def _stacked(
    key: str,
    path: str,
    found: Mapping[tuple[str, int, int], StoredTensor],
    factor: str,
    experts: int,
    places: int,
) -> StackedTensor:
    try:
        parts = tuple(
            tuple(found[factor, e, place] for place in range(places)) for e in range(experts)
        )
    except KeyError as error:
        raise UsageError(
            f"{path} is one weight today, of all {experts} experts and projections, but the "
            f"adapter lacks some of them (expert {error.args[0][1]})"
        ) from None
    shapes = {part.shape for expert in parts for part in expert}
    if len(shapes) != 1 or len(rows := next(iter(shapes))) != 2:
        raise UsageError(f"{path} is one weight today, but the experts' adapters differ in shape")
    m, n = rows
    shape = (experts * places * m, n) if factor == "A" else (places * m, places * n * experts)
    first = parts[0][0]
    return StackedTensor(first.file, key, first.dtype, shape, 0, 0, parts)
