"""A `.gguf` file becomes an ordinary Hugging Face model directory, once, tensor by tensor.

transformers reads safetensors part by part, but a GGUF file only whole, and no rank may hold the
whole base. So the first rank that comes writes the directory, and the others wait for it:

    model.gguf --lock--> NAME-KEY.tmp/ (config, tokenizer, model-0000i-of-N.safetensors, marker)
                           --fsync, rename--> NAME-KEY/ --> from_pretrained on every rank

KEY is a hash of the file's content, the dtype and the versions of what converts. A directory
without the ending `.tmp` is complete, because it only gets its name once all of it is on the disk.
What the file's tensors mean is `gguf_tensors`' part.
"""

import gc
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import filelock
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file

from dlora.base.gguf_tensors import GgufSource, open_gguf, some
from dlora.errors import UsageError
from dlora.io.files import sync
from dlora.runtime.memory import trim

FORMAT = 1  # raise it when what is written here changes, so that old directories are left alone
SHARD_BYTES = 256 * 10**6  # converted tensors held in memory before they go to a file
WHOLE_HASH_BYTES = 1 << 30  # files up to this size are hashed whole, larger ones by samples
SAMPLE_BYTES, SAMPLES = 1 << 20, 64
MARKER = "dlora_base.json"


def converted_base(
    gguf: Path, cache_dir: Path, dtype: torch.dtype, announce: Callable[[str], None]
) -> Path:
    """The Hugging Face model directory for `gguf` in `dtype`, converted now unless it exists.

    Any number of processes may call this at once: one converts, the others wait and get the same
    path. `announce` gets a line when something is written. What the user can fix is a `UsageError`
    that names `model.path` or `model.cache_dir`.
    """
    gguf, cache_dir = gguf.expanduser().absolute(), cache_dir.expanduser().absolute()
    key = _content_key(gguf, dtype)
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in gguf.stem)
    target = cache_dir / f"{stem[:80]}-{key[:20]}"
    if _is_finished(target, key):  # before any lock: a cache may be shared and read-only
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(target):
            if not _is_finished(target, key):
                _remove_leftovers(cache_dir, target)
                _convert(gguf, target, dtype, key, announce)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"model.cache_dir: cannot write the converted base under {cache_dir}: {error}"
        ) from error
    return target


def _content_key(gguf: Path, dtype: torch.dtype) -> str:
    """SHA-256 of the content and of all else that the result depends on.

    A file of up to 1 GiB is hashed whole, so that a copy finds its conversion. Every rank does this
    at every start, so of a larger one only samples are read, head and tail among them, and its date
    stands in for the rest.
    """
    try:
        with gguf.open("rb") as file:
            if (magic := file.read(4)) != b"GGUF":
                raise UsageError(f"model.path: {gguf} is no GGUF file: it begins with {magic!r}")
            stat = os.fstat(file.fileno())
            versions = (transformers.__version__, importlib.metadata.version("gguf"))
            digest = hashlib.sha256(repr((FORMAT, *versions, str(dtype), stat.st_size)).encode())
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
        raise UsageError(f"model.path: cannot read {gguf}: {error.strerror}") from error


def _is_finished(target: Path, key: str) -> bool:
    """Whether `target` holds every file that its marker lists, in the length that was written."""
    try:
        marker = json.loads((target / MARKER).read_text())
        sizes = {name: (target / name).stat().st_size for name in marker["files"]}
        return marker["key"] == key and sizes == marker["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _lock(target: Path, timeout: float = -1) -> filelock.BaseFileLock:
    """Held while `target` or its temporary directory is written; a dying process lets go of it."""
    return filelock.FileLock(f"{target}.lock", timeout=timeout)


def _remove_leftovers(cache_dir: Path, target: Path) -> None:
    """Removes a damaged `target` and what dead converters left. The caller holds the lock."""
    shutil.rmtree(target, ignore_errors=True)
    for temporary in cache_dir.glob("*.tmp"):
        owner = temporary.with_suffix("")
        if owner == target:
            shutil.rmtree(temporary)
            continue
        try:
            with _lock(owner, timeout=0):
                shutil.rmtree(temporary, ignore_errors=True)
        except filelock.Timeout:
            pass  # that converter is alive


def _convert(
    gguf: Path, target: Path, dtype: torch.dtype, key: str, announce: Callable[[str], None]
) -> None:
    """Writes `target` under a temporary name; whatever goes wrong, nothing of it stays."""
    temporary = target.with_name(f"{target.name}.tmp")
    temporary.mkdir()
    try:
        source = open_gguf(gguf, temporary, dtype)
        gc.collect()
        trim()
        model, dtype_name = source.model, str(dtype).removeprefix("torch.")
        need, free = _stored_bytes(source, dtype), shutil.disk_usage(temporary).free
        if need > free:
            raise UsageError(
                f"model.cache_dir: {target.parent} has {free / 1e6:.0f} MB free, and the base of "
                f"{gguf.name} in {dtype_name} needs {need / 1e6:.0f} MB"
            )
        size = f"{need / 1e6:.0f} MB"
        announce(f"converting {gguf} to {dtype_name} under {target} ({size}), once")
        _write_weights(source, temporary, dtype)
        if source.unused:
            announce(f"{gguf.name}: the model has no place for {some(source.unused)}; left out")
        model.config.save_pretrained(temporary)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        if _content_key(gguf, dtype) != key:
            raise UsageError(f"model.path: {gguf} changed while it was being converted")
        _write_marker(temporary, key)
        os.rename(temporary, target)
        sync(target.parent)
        gc.collect()
        trim()
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _stored_bytes(source: GgufSource, dtype: torch.dtype) -> int:
    """What the weights will take on the disk; tied ones are one parameter and count once."""
    return sum(p.numel() for p in source.model.parameters()) * dtype.itemsize


def _write_weights(source: GgufSource, folder: Path, dtype: torch.dtype) -> None:
    """All tensors as `model-0000i-of-N.safetensors` of about `SHARD_BYTES`, and their index."""
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(held, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in source.tensors(dtype):
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        # a slice of something larger would keep all of that in memory
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        held[name] = tensor if whole else tensor.contiguous().clone()
        total += tensor.nbytes
        del tensor
    flush()
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"part-{number}", folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps(index, indent=2))
    for file in set(weight_map.values()):  # safetensors made them for this user only
        shutil.copymode(index_file, folder / file)


def _write_marker(folder: Path, key: str) -> None:
    """The list by which `_is_finished` knows the directory; written after everything else."""
    files = {}
    for file in sorted(folder.iterdir()):
        files[file.name] = file.stat().st_size
        sync(file)
    (folder / MARKER).write_text(json.dumps({"key": key, "files": files}, indent=2))
    sync(folder / MARKER)
    sync(folder)
