"""The identity of a base, whatever its path: its configuration and a sample of its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dlora.base.source import BaseSource
from dlora.base.weight_files import are_local, weight_files
from dlora.io.safetensors import StoredTensor, stored_tensors

SAMPLED_TENSORS = 64
SAMPLED_BYTES = 4096  # of each, in the middle
# Keys of transformers' configuration that name the files' place and writer, not the model.
_NOT_IDENTITY = {"_name_or_path", "transformers_version", "_commit_hash", "dtype", "torch_dtype"}


def identity(base: BaseSource, skeleton: Any) -> str | None:
    """SHA-256 (hex) of a base whose files are on this machine; None: not downloaded yet.

    It covers the configuration, the names, types and shapes of all tensors, and bytes of up to 64
    of them, so that a few reads distinguish a fine-tuned model, or another one of the same shape.
    It does not cover the dtype in which the base is loaded, which is an option of the run.
    """
    if not are_local(base):
        return None
    digest = hashlib.sha256()
    config = {k: v for k, v in skeleton.config.to_dict().items() if k not in _NOT_IDENTITY}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(base):
        tensors |= stored_tensors(file)
    ordered = [tensors[key] for key in sorted(tensors)]
    digest.update(json.dumps([(t.key, t.dtype, t.shape) for t in ordered]).encode())
    for tensor in ordered[:: -(-len(ordered) // SAMPLED_TENSORS)]:
        at = tensor.start + max(0, tensor.nbytes - SAMPLED_BYTES) // 2
        digest.update(_bytes_at(tensor.file, at, min(SAMPLED_BYTES, tensor.nbytes)))
    return digest.hexdigest()


def _bytes_at(file: Path, start: int, count: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(count)
