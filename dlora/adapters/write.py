"""Writing an adapter's directory: PEFT's two files, and what they record of the base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from dlora.io.files import inside, write_atomically

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROUTER = "router.safetensors"  # of a mixture of experts, which has the two files for each of them


def write_files(
    directory: str | Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write PEFT's two files, each beside its place and then renamed.

    Args:
        directory: created if need be.
        metadata: of the tensors' file.
        beside: {name: content} of further files.
    """
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (beside or {}).items():
        write_atomically(directory / name, content)
    header = dict(metadata or {"format": "pt"})
    write_atomically(directory / WEIGHTS, save(dict(tensors), metadata=header))
    # Not sorted: of two patterns that match, the first one counts.
    write_atomically(directory / CONFIG, (json.dumps(settings, indent=2) + "\n").encode())
    (directory / ROUTER).unlink(missing_ok=True)  # of a mixture that was here before


def recorded_name(name: str) -> str:
    """A hub id, or the absolute path of what is here: adapters are used in other directories."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def converted_line(path: str, source: str) -> str | None:
    """What to say of an adapter whose base was converted from a `.gguf` file; None of others."""
    if not path.endswith(".gguf"):
        return None
    return (
        f"the adapter names the converted base {source}, since PEFT reads no .gguf; it is needed "
        "as long as the adapter is"
    )


def digest_of(directory: Path) -> str:
    """SHA-256 (hex) of the tensors' file of an adapter."""
    with inside(directory, WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
