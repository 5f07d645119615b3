"""All ways in for a base and an adapter that a stranger made, and what they answer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import loaded
from tiny import command

from dlora import generate, load_adapter
from dlora.config.load import parse
from dlora.errors import UsageError
from dlora.export import command as export
from dlora.runtime.ranks import Ranks
from dlora.training.startup import prepared

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def preparation(argv: list[str]) -> None:
    prepared(parse(argv, "dlora.train").config, Ranks(0, 1, torch.device("cpu"), None))


def starting_from(adapter: Path, base: Path) -> list[str]:
    return command(base, adapter.parent, adapter__r=None, adapter__path=str(adapter))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_line(work: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as refused:
        work()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def readings(adapter: Path, base: Path) -> list[Callable[[], Any]]:
    """All ways in for an adapter."""
    words = ["--adapter", str(adapter)]
    return [
        lambda: load_adapter(loaded(base), adapter),
        lambda: preparation(starting_from(adapter, base)),
        lambda: export.main([*words, "--base", str(base), "--to", str(adapter.parent / "to")]),
        lambda: generate.main([*words, "--base", str(base), "--prompt", "x"]),
    ]
