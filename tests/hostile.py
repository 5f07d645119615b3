"""All ways in for a base and an adapter that a stranger made, and what they answer."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exported import loaded
from refusals import preparation
from tiny import command

from dlora import generate, load_adapter
from dlora.export import command as export

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def starting_from(adapter: Path, base: Path) -> list[str]:
    return command(base, adapter.parent, adapter__r=None, adapter__path=str(adapter))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def agree(directory: Path, hashes: bool = True) -> None:
    """Let the manifest say of the files what they are, and of itself."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, said in manifest["files"].items() if hashes else ():
        data = (directory / name).read_bytes()
        said |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    own = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(rest | {"sha256": own}))


def readings(adapter: Path, base: Path) -> list[Callable[[], Any]]:
    """All ways in for an adapter."""
    words = ["--adapter", str(adapter)]
    return [
        lambda: load_adapter(loaded(base), adapter),
        lambda: preparation(starting_from(adapter, base)),
        lambda: export.main([*words, "--base", str(base), "--to", str(adapter.parent / "to")]),
        lambda: generate.main([*words, "--base", str(base), "--prompt", "x"]),
    ]
