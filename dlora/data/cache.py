"""Encoded data sets on disk, by content: `data.cache_dir`.

key     files' names and bytes, the tokenizer, the settings, versions ──SHA-256──> name
build   the first process that wants it encodes; others on the node wait at a lock, and read it
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import safetensors
import safetensors.numpy

from dlora.data.dataset import Dataset
from dlora.data.files import Sources, is_builtin, resolve, sources_of
from dlora.data.kinds import KINDS
from dlora.errors import UsageError
from dlora.io.files import write_atomically

_FORM = 3  # of the file; part of the key
_ARRAYS = ("input_ids", "labels", "starts")


def cached(
    cache_dir: Path,
    build: Callable[[], Dataset],
    announce: Callable[[str], None],
    *,
    source: Sources,
    key: str,
    tokenizer: Any,
    **settings: Any,
) -> Dataset:
    """What `build` returns, or has returned before for the same content.

    Args:
        cache_dir: made if need be; files in it are never deleted.
        source, key, tokenizer, settings: what `build` gives to `load_examples`.

    Raises:
        UsageError: as `build`; or the directory cannot be written.
    """
    name = _name(source, key, tokenizer, settings)
    path = cache_dir / f"{name}.safetensors"
    with _writable(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{path}.lock")
        lock.acquire()
    try:
        if (found := stored(path)) is not None:
            announce(f"{key}: encoded before; read from {path} (data.cache_dir)")
            return found
        dataset = build()
        with _writable(cache_dir):
            write_atomically(path, content_of(dataset))
        announce(f"{key}: encoded, and written to {path} (data.cache_dir)")
        return dataset
    finally:
        lock.release()


@contextmanager
def _writable(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"data.cache_dir: {cache_dir}: {error.strerror or error}") from None


def _name(source: Sources, key: str, tokenizer: Any, settings: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    versions = [version(package) for package in ("transformers", "tokenizers")]
    own = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    own.append(sorted((name, str(value)) for name, value in tokenizer.init_kwargs.items()))
    parts = [_FORM, versions, own, sorted(settings.items())]
    digest.update(json.dumps(parts, default=str).encode())
    if is_builtin(source):
        digest.update(f"{source} of Python {sys.version}".encode())
        return digest.hexdigest()[:32]
    digest.update(repr([entry.weight for entry in sources_of(source, key)]).encode())
    for place in resolve(source, key):
        content = KINDS[place.kind].digest(place)
        # The name stands in what is said of records.
        digest.update(f"{place.path}\0{place.part}\0{content}\0".encode())
    return digest.hexdigest()[:32]


def content_of(dataset: Dataset) -> bytes:
    """The file of a data set."""
    arrays: dict[str, Any] = dict(zip(_ARRAYS, dataset.arrays, strict=True))
    return safetensors.numpy.save(arrays, dataset.about)


def stored(path: Path) -> Dataset | None:
    """The data set of a file; None if there is none, or it is not what was written."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return Dataset.of([file.get_tensor(name) for name in _ARRAYS], file.metadata())
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, IndexError):
        return None
