"""Which files belong to a base, and whether they are whole."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from dlora.base.source import BaseSource
from dlora.errors import UsageError, and_more
from dlora.io.files import plain_name, read_object
from dlora.io.safetensors import stored_tensors

INDEX = "model.safetensors.index.json"
# Of a model that `dlora compress` wrote: a name that transformers does not read, since it would
# draw at random what it does not find.
LOW_RANK = "low_rank"
LOW_RANK_INDEX = f"{LOW_RANK}.safetensors.index.json"
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


def cached(base: BaseSource, name: str) -> Path | None:
    """A file of the base, downloaded from the hub if need be; None: the base has no such file."""
    from transformers.utils.hub import cached_file

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
    found = (cached(name) for name in (INDEX, LOW_RANK_INDEX))
    index = next((path for path in found if isinstance(path, str)), None)
    if index is None:
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
    if cached(base, "adapter_config.json"):
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
    from transformers.utils.hub import get_checkpoint_shard_files

    try:
        if single := cached(base, "model.safetensors"):
            return [single]
        if index := cached(base, INDEX) or cached(base, LOW_RANK_INDEX):
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


def beside_weights(base: BaseSource) -> Iterator[tuple[Path, Path]]:
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
