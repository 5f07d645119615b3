"""How records are read and the base is loaded: as the run did that wrote the adapter.

    option of the command line  >  the run that wrote the adapter  >  the option's default

So the loss is the one that the run logs. A line says what comes from the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlora.checkpoint.written_by import WrittenBy, written_by
from dlora.config.load import SCHEMA
from dlora.config.options import Given, convert
from dlora.data import FORMATS
from dlora.errors import UsageError
from dlora.io.files import read_object
from dlora.registry import room

# field: key of the configuration
KEYS = {
    "dtype": "model.dtype",
    "quantization": "model.quantization",
    "format": "data.format",
    "columns": "data.columns",
    "max_length": "data.max_length",
    "packing": "data.packing",
}


@dataclass(frozen=True)
class Settings:
    """How a model is loaded and its data are read; the fields are keys of a configuration."""

    dtype: str
    quantization: str
    format: str
    columns: Mapping[str, str]
    max_length: int
    packing: bool | str


def settled(
    given: Mapping[str, Any], adapter: Path | None, announce: Callable[[str], None]
) -> Settings:
    """The settings of an evaluation.

    Args:
        given: what the command line says, by field; None: nothing.
        adapter: its directory, which a run may have written.
        announce: gets a line about what is taken from the run.

    Raises:
        UsageError: the run's configuration has a value that none of its options can have.
    """
    found = {} if adapter is None else of_run(adapter)
    values, taken = {}, []
    for field, key in KEYS.items():
        if given.get(field) is not None:
            values[field] = given[field]
            continue
        values[field] = found.get(key, SCHEMA[key].default)
        if values[field] != SCHEMA[key].default:
            taken.append(f"{key}: {values[field]}")
    if taken:
        announce(f"as in the run that wrote the adapter: {', '.join(taken)}")
    return Settings(**values)


def base_of_run(adapter: Path) -> str | None:
    """The identity of the base that the run of an adapter recorded; None: it is not known."""
    if (adapter / "manifest.json").exists():
        found = read_object(adapter / "state.json").get("base")
    else:
        run = written_by(adapter)
        found = run.state().get("base") if run else None
    return found if isinstance(found, str) else None


def of_run(adapter: Path) -> dict[str, Any]:
    """What the run that wrote an adapter had set, by key; {} where no run did.

    A base that was packed less its start (PiSSA on nf4) is not the one that the adapter, which is
    for the untouched base, is evaluated on: nothing says how it was packed.
    """
    own = (adapter / "manifest.json").exists()
    run = WrittenBy(adapter) if own else written_by(adapter)
    sections = run.settings() if run else {}
    values = {}
    for key in (*KEYS.values(), "adapter.init_lora_weights"):
        section, _, name = key.partition(".")
        body = sections.get(section)
        if isinstance(body, dict) and name in body:
            where = f"{run.directory / 'config.yaml'}: " if run else ""
            values[key] = convert(SCHEMA[key], Given(body[name], where))
    init = values.pop("adapter.init_lora_weights", True)
    if room("lora.init")[init].says.get("needs") == "weight":
        values.pop("model.quantization", None)
    if values.get("data.format", "chat") not in FORMATS:
        raise UsageError(f"{adapter}: its run's data.format is {values['data.format']!r}")
    return values
