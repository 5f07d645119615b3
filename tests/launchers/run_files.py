"""The file of a tiny run."""

import json
from pathlib import Path
from typing import Any

import torch
from run_training import BASE_SETTINGS
from tiny import save_chats, save_model


def write_run(file: Path, **settings: Any) -> Path:
    """A configuration of BASE_SETTINGS and `settings`; `__` is a dot."""
    flat = BASE_SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
    sections: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    file.write_text(json.dumps(sections))
    return file


def tiny_run(root: Path, **settings: Any) -> Path:
    """The same with a model and data of its own in `root`."""
    save_model(root / "model", "llama", torch.float32)
    lies = {
        "model__path": str(root / "model"),
        "data__train": str(save_chats(root / "chats.jsonl", 24)),
        "output__dir": str(root / "run"),
    }
    return write_run(root / "run.json", **lies | settings)
