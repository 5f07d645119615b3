"""The tensors in a base's files, and which of their keys becomes which parameter.

A file's keys are not the names of the model's parameters: transformers adds or drops a prefix,
renames old spellings, stacks experts and unfuses projections while it loads. transformers' own
rules decide here which key becomes which parameter. Only a parameter that is renamed and nothing
else can be changed in place.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dlora.base.source import BaseSource
from dlora.base.weight_files import beside_weights, cached, weight_files
from dlora.errors import UsageError, and_more
from dlora.io.safetensors import FLOATS, StoredTensor, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter


class StoredBase:
    """The files of a model directory or hub snapshot; only their headers are read.

    Attributes:
        tensors: by key, in the order of the files.

    Raises:
        UsageError: there are no safetensors, they are damaged, or they are quantized.
    """

    def __init__(self, base: BaseSource, skeleton: PreTrainedModel) -> None:
        if getattr(skeleton.config, "quantization_config", None) is not None:
            raise UsageError(
                f"{base.path} is quantized; ΔW can only be added to floating-point weights"
            )
        self.base = base
        self.tensors: dict[str, StoredTensor] = {}
        for file in weight_files(base):
            self.tensors |= stored_tensors(file)
        expected = skeleton.state_dict()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        origins = origins_of_parameters(skeleton, self.tensors, expected)
        self._skeleton, self._origins = skeleton, origins
        self._keys = {name: o.keys for name, o in origins.items() if o.converter is None}
        self._dtypes = {
            key: expected[name].dtype
            for name, origin in origins.items()
            if name in expected
            for key in origin.keys
        }

    def has(self, name: str) -> bool:
        """Whether exactly one key becomes the parameter `name`, by a new name alone."""
        return len(self._keys.get(name, ())) == 1

    def dtype_of(self, key: str) -> torch.dtype:
        """The dtype in which `key` is loaded: the base's, or that which its class pins it to."""
        return self._dtypes.get(key, self.base.dtype)

    def key_of(self, name: str) -> str:
        """The one key that becomes the parameter `name` by a new name alone.

        Raises:
            UsageError: there is none, or its value has another type or shape.
        """
        keys = self._keys.get(name, [])
        if len(keys) != 1:
            what = f"in {len(keys)} places" if keys else "under no name of its own"
            raise UsageError(
                f"{name} is adapted, but the files of {self.base.path} contain it {what} "
                "(transformers assembles it while loading), so it cannot be merged in place"
            )
        tensor = self.tensors[keys[0]]
        if tensor.dtype not in FLOATS or tensor.shape != self._shapes[name]:
            raise UsageError(
                f"{name} is adapted, but {tensor.file} contains {tensor.key} as {tensor.dtype} "
                f"{list(tensor.shape)}, and the model needs floats {list(self._shapes[name])}"
            )
        return keys[0]

    def stacked(self, name: str) -> dict[int, list[str]]:
        """{expert: its keys} of a parameter that transformers stacks from keys of each expert."""
        origin = self._origins.get(name)
        if origin is None or origin.converter is None or not stacks_alone(origin):
            return {}
        by_pattern: dict[str, list[str]] = {}
        for key, pattern in zip(origin.keys, origin.patterns, strict=True):
            by_pattern.setdefault(pattern, []).append(key)
        experts = self._shapes[name][0]
        if any(len(keys) != experts for keys in by_pattern.values()):
            return {}
        return {e: [keys[e] for keys in by_pattern.values()] for e in range(experts)}

    def unstacked(self, name: str, expert: int, value: Tensor) -> dict[str, Tensor]:
        """{key: its part} of a value [1, …] for one expert of such a parameter.

        It is taken apart as transformers takes weights apart that it saves.
        """
        from transformers.core_model_loading import revert_weight_conversion

        first, own = self.stacked(name)[0], self.stacked(name)[expert]
        parts = revert_weight_conversion(self._skeleton, {name: value})
        if parts.keys() != set(first):
            raise UsageError(
                f"{name} is adapted, but transformers saves it as {and_more(sorted(parts), 1)}, "
                f"which {self.base.path} does not contain, so it cannot be merged in place"
            )
        return {key: parts[key_of_first] for key_of_first, key in zip(first, own, strict=True)}

    def config(self) -> dict[str, Any]:
        """The content of `config.json`."""
        path = cached(self.base, "config.json")
        assert path is not None  # it has been read before
        return json.loads(path.read_text(encoding="utf-8"))

    def copy_rest(self, folder: Path) -> None:
        """Copy the tokenizer and other small files, but neither weights nor `config.json`."""
        for path, name in beside_weights(self.base):
            target = folder / name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


@dataclass(frozen=True)
class Origin:
    """The keys of the files that become one parameter, or several.

    Attributes:
        keys: in the order of transformers.
        patterns: of each key, the converter's pattern that it matches.
        converter: makes the parameters of the keys; None: one key is renamed.
    """

    keys: list[str]
    patterns: list[str]
    converter: WeightConverter | None


def stacks_alone(origin: Origin) -> bool:
    """Whether the keys are stacked along dim 0 and that dim is not touched again."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    assert origin.converter is not None
    stack, *rest = origin.converter.operations
    return (
        isinstance(stack, MergeModulelist)
        and stack.dim == 0
        and all(isinstance(op, Concatenate) and op.dim > 0 for op in rest)
    )


def origins_of_parameters(
    model: PreTrainedModel, keys: Iterable[str], expected: dict[str, Any]
) -> dict[str, Origin]:
    """{parameter: its origin}; a converter that makes several is listed under the first of them.

    It follows the first half of transformers' `convert_and_load_state_dict_in_model`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    found: dict[str, Origin] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:  # renamed where it should not have been
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        origin = found.setdefault(name, Origin([], [], by_pattern[pattern] if pattern else None))
        origin.keys.append(key)
        origin.patterns.append(pattern or key)
    return found
