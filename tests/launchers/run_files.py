"""The file of a tiny run."""

import json
from pathlib import Path
from typing import Any

from run_training import BASE_SETTINGS


def write_run(file: Path, **settings: Any) -> Path:
    """A configuration of BASE_SETTINGS and `settings`; `__` is a dot."""
    flat = BASE_SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
    sections: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    file.write_text(json.dumps(sections))
    return file
