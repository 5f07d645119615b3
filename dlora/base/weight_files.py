"""The files of a base: which key becomes which parameter, and which files belong to it.

A file's keys are not the names of the model's parameters: transformers adds or drops a prefix,
renames old spellings, stacks experts and unfuses projections while it loads. transformers' own
rules decide here which key becomes which parameter. Only a parameter that is renamed and nothing
else can be changed in place.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from dlora.base.source import BaseSource
from dlora.errors import UsageError, and_more
from dlora.io.files import plain_name, read_object
from dlora.io.safetensors import FLOATS, StoredTensor, stored_tensors

INDEX = "model.safetensors.index.json"
# The other files of a model directory: settings, tokenizer, templates, code, licence.
BESIDE_WEIGHTS = (
    "*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
FILE_LIST = "dlora_base.json"  # of a converted GGUF file
LEFT_OUT = ("*.index.json", FILE_LIST, "adapter_config.json")


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
        path = _cached(self.base, "config.json")
        assert path is not None  # it has been read before
        return json.loads(path.read_text(encoding="utf-8"))

    def copy_rest(self, folder: Path) -> None:
        """Copy the tokenizer and other small files, but neither weights nor `config.json`."""
        for path, name in _beside_weights(self.base):
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


def _cached(base: BaseSource, name: str) -> Path | None:
    """A file of the base, downloaded from the hub if need be; None: the base has no such file."""
    found = cached_file(
        base.source, name, revision=base.revision, _raise_exceptions_for_missing_entries=False
    )
    return Path(found) if found else None


def are_local(base: BaseSource) -> bool:
    """Whether the weights are in a directory or in the hub's cache; the network is not used."""
    if Path(base.source).is_dir():
        return True
    cached = functools.partial(
        try_to_load_from_cache, base.source, revision=base.revision or "main"
    )
    if isinstance(cached("model.safetensors"), str):
        return True
    index = cached(INDEX)
    if not isinstance(index, str):
        return False
    return all(isinstance(cached(shard), str) for shard in _shards(Path(index)))


def check_files(base: BaseSource) -> None:
    """Check that `from_pretrained` would read the base's weights, and nothing else.

    Raises:
        UsageError: there are no safetensors, they are damaged, their index names files elsewhere or
            of another kind, or there is an adapter beside them, which transformers would load where
            PEFT is installed.
    """
    try:
        for file in weight_files(base):
            stored_tensors(file)
    except UsageError as error:
        raise UsageError(f"model.path: {error}") from error
    if _cached(base, "adapter_config.json"):
        raise UsageError(
            f"model.path: {base.path} contains an adapter_config.json, and transformers would load "
            "that adapter where PEFT is installed; move it, and set adapter.path to it"
        )


def check_loaded(path: str, found: dict[str, Any], may_lack: Collection[str] = ()) -> None:
    """Raise a `UsageError` if `from_pretrained` found a parameter missing or of another shape.

    Args:
        path: of the base, for the error.
        found: transformers' report, with `ignore_mismatched_sizes`.
        may_lack: parameters that may be missing.
    """
    if missing := sorted(set(found["missing_keys"]) - set(may_lack)):
        raise UsageError(f"model.path: the files of {path} do not contain {and_more(missing, 1)}")
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise UsageError(
            f"model.path: {path} has {name} as {list(stored)}, but the model needs {list(wanted)}"
        )


def weight_files(base: BaseSource) -> list[Path]:
    """The files that `from_pretrained` reads."""
    try:
        if single := _cached(base, "model.safetensors"):
            return [single]
        if index := _cached(base, INDEX):
            _shards(index)
            files, _ = get_checkpoint_shard_files(base.source, str(index), revision=base.revision)
            return [Path(file) for file in files]
    except UsageError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"cannot read the weights of {base.path}: {error}") from error
    raise UsageError(f"{base.path} contains neither model.safetensors nor {INDEX}")


def _shards(index: Path) -> set[str]:
    """The files that an index names.

    Raises:
        UsageError: it is no index, or names a file elsewhere or of another kind.
    """
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise UsageError(f"{index}: weight_map: names no files")
    for name in named.values():
        if not plain_name(index, name).endswith(".safetensors"):
            raise UsageError(f"{index}: weight_map: {name!r} is not a safetensors file")
    return set(named.values())


def _beside_weights(base: BaseSource) -> Iterator[tuple[Path, Path]]:
    """(file, name within the model directory) of every file but weights and `config.json`."""
    folder = Path(base.source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(
                base.source, revision=base.revision, allow_patterns=list(BESIDE_WEIGHTS)
            )
        )
    for pattern in BESIDE_WEIGHTS:
        for path in sorted(folder.glob(pattern)):
            left_out = path.name == "config.json" or any(path.match(other) for other in LEFT_OUT)
            if path.is_file() and not left_out:
                yield path, path.relative_to(folder)
