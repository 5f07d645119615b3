"""What an earlier start of the same run chose, so that a resume keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from dlora.checkpoint import newest_first, verify
from dlora.config import Config, is_set
from dlora.errors import UsageError

CONFIG, STATE = "config.yaml", "state.json"


@dataclass(frozen=True)
class Earlier:
    """The placement that a checkpoint was written under; `ranks` is None if it does not say."""

    engine: str
    base: str
    optimizer_state: str
    ranks: int | None


@dataclass(frozen=True)
class Settings:
    """What the plan may choose from: the configuration, and what an earlier start made of it."""

    engine: str
    base: str
    optimizer_state: str
    said: str = ""


def earlier_placement(config: Config) -> Earlier | None:
    """That of the checkpoint from which `output.resume` would go on; None if there is none.

    Only its small files are read and verified. What is wrong with it is said by the resume itself.
    """
    for directory in _candidates(config):
        try:
            verify(directory, (CONFIG, STATE))
            section = yaml.safe_load((directory / CONFIG).read_text("utf-8"))["sharding"]
            ranks = json.loads((directory / STATE).read_text("utf-8")).get("ranks")
            return Earlier(
                section["engine"], section["base"], section.get("optimizer_state", "auto"), ranks
            )
        except (UsageError, OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            continue
    return None


def settle(config: Config, earlier: Earlier | None, world: int) -> Settings:
    """The configuration's settings; where they are open, those of a start on as many ranks."""
    own = config.sharding
    settings = Settings(own.engine, own.base, own.optimizer_state)
    if own.base != "auto" or earlier is None or earlier.base == "auto":
        return settings
    if earlier.ranks not in (None, world):
        said = f"chosen again, for {world} rank(s) where the checkpoint has {earlier.ranks}"
        return Settings(own.engine, own.base, own.optimizer_state, said)
    return Settings(
        own.engine if is_set(config, "sharding.engine") else earlier.engine,
        earlier.base,
        earlier.optimizer_state if own.optimizer_state == "auto" else own.optimizer_state,
        "as in the checkpoint",
    )


def _candidates(config: Config) -> Iterator[Path]:
    wanted = config.output.resume
    if wanted == "auto":
        yield from newest_first(Path(config.output.dir) / "checkpoints")
    elif wanted != "none":
        yield Path(wanted)
