"""The run that wrote an adapter, found from the adapter's directory.

<run>/adapter/                    beside it: config.yaml, metrics.jsonl, checkpoints/
<run>/adapters/NAME/adapter/      of several in one run: beside it metrics.jsonl, the rest in <run>
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dlora.checkpoint.listing import steps_in
from dlora.config.adapters import OWN
from dlora.config.members import ADAPTERS
from dlora.errors import UsageError
from dlora.io.files import read_object

CONFIG = "config.yaml"


@dataclass(frozen=True)
class WrittenBy:
    """A run of dlora.

    Attributes:
        directory: its `output.dir`.
        name: of the adapter, of several in one run.
    """

    directory: Path
    name: str | None = None

    def settings(self) -> dict[str, Any]:
        """`config.yaml`, as a run of this adapter alone would have it; {} if it cannot be read."""
        try:
            found = yaml.safe_load((self.directory / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            return {}
        if not isinstance(found, dict):
            return {}
        return found if self.name is None else own_settings(found, self.name)

    def state(self) -> dict[str, Any]:
        """`state.json` of the newest checkpoint, as a run of this adapter alone has it; {}."""
        for _, checkpoint in reversed(steps_in(self.directory / "checkpoints")):
            try:
                state = read_object(checkpoint / "state.json")
            except UsageError:  # unfinished or damaged: an older one knows it as well
                continue
            return state if self.name is None else own_state(state, self.name)
        return {}


def written_by(adapter: Path) -> WrittenBy | None:
    """The run that wrote an adapter into this directory; None where no run has left its files."""
    around = adapter.resolve().parent
    several = WrittenBy(around.parent.parent)
    entries = several.settings().get(ADAPTERS) if around.parent.name == ADAPTERS else None
    if isinstance(entries, list):
        names = [entry.get("name") for entry in entries if isinstance(entry, dict)]
        if around.name in names:
            return WrittenBy(several.directory, around.name)
    return WrittenBy(around) if (around / CONFIG).is_file() else None


def own_settings(settings: Any, name: str) -> Any:
    """`config.yaml` of a run of several adapters, as that of one of them alone.

    What is no mapping stays, for a reader that checks it.
    """
    if not isinstance(settings, dict):
        return settings
    entries = settings.get(ADAPTERS)
    each = entries if isinstance(entries, list) else []
    entry = next((e for e in each if isinstance(e, dict) and e.get("name") == name), {})
    sections = {section: body for section, body in settings.items() if section != ADAPTERS}
    for section in OWN:
        common, own = sections.get(section, {}), entry.get(section, {})
        if isinstance(common, dict) and isinstance(own, dict):
            sections[section] = {**common, **own}
    return sections


def own_state(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`state.json` of a run of several adapters, as that of one of them alone."""
    each = state.get(ADAPTERS)
    entry = each.get(name) if isinstance(each, dict) else None
    common = {key: value for key, value in state.items() if key != ADAPTERS}
    return {**common, **(entry if isinstance(entry, dict) else {})}


def names_in(state: Mapping[str, Any]) -> list[str]:
    """The adapters whose run wrote this `state.json`, where it trained several."""
    found = state.get(ADAPTERS)
    return list(found) if isinstance(found, dict) else []
