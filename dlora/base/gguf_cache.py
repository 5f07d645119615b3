"""The directory of conversions of `.gguf` files: their keys, and which of them are whole."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import filelock
import torch

from dlora.base.weight_files import FILE_LIST
from dlora.errors import UsageError

CONVERSION = 2  # raise it when what is written here changes, so that old directories are not used
WHOLE_HASH_BYTES = 1 << 30  # files up to this size are hashed whole, larger ones by samples
SAMPLE_BYTES, SAMPLES = 1 << 20, 64


def content_key(path: Path, dtype: torch.dtype) -> str:
    """SHA-256 (hex) of the content and of all else that the result depends on.

    A file of up to 1 GiB is hashed whole, so that a copy finds its conversion. Every rank does this
    at every start, so of a larger one only samples are read, head and tail among them, and its date
    covers the rest.
    """
    try:
        with path.open("rb") as file:
            if (magic := file.read(4)) != b"GGUF":
                raise UsageError(f"model.path: {path} is not a GGUF file: it begins with {magic!r}")
            stat = os.fstat(file.fileno())
            versions = [importlib.metadata.version(name) for name in ("transformers", "gguf")]
            digest = hashlib.sha256(
                repr((CONVERSION, *versions, str(dtype), stat.st_size)).encode()
            )
            if stat.st_size <= WHOLE_HASH_BYTES:
                while block := file.read(SAMPLE_BYTES):
                    digest.update(block)
                return digest.hexdigest()
            digest.update(str(stat.st_mtime_ns).encode())
            for sample in range(SAMPLES):
                file.seek((stat.st_size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
            return digest.hexdigest()
    except OSError as error:
        raise UsageError(f"model.path: cannot read {path}: {error.strerror}") from error


def sizes_in(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def is_whole(target: Path) -> bool:
    """Whether `target` has every file of its list, in the length that was written."""
    try:
        return json.loads((target / FILE_LIST).read_text()).items() <= sizes_in(target).items()
    except (OSError, ValueError, AttributeError):
        return False


def lock_of(target: Path, timeout: float = -1) -> filelock.BaseFileLock:
    """Held while `target` is written; the kernel releases it when the process dies."""
    return filelock.FileLock(f"{target}.lock", timeout=timeout)


def remove_leftovers(cache_dir: Path) -> None:
    """Delete what converters that died left, of any file."""
    for temporary in cache_dir.glob(".*.tmp"):
        owner = temporary.name[1:].rsplit(".", 2)[0]
        with contextlib.suppress(filelock.Timeout), lock_of(cache_dir / owner, timeout=0):
            shutil.rmtree(temporary, ignore_errors=True)
