"""What an earlier start of the same run chose, so that a resumed run chooses it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dlora.config.load import Config, is_set


@dataclass(frozen=True)
class Earlier:
    """The placement that a checkpoint was written under; `ranks` is None where unknown."""

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
    reason: str = ""


def earlier_placement(settings: Mapping[str, Any], state: Mapping[str, Any]) -> Earlier | None:
    """The placement of a checkpoint by its `config.yaml` and `state.json`; None if unknown."""
    section = settings.get("sharding", {})
    if not {"engine", "base"} <= section.keys():
        return None
    stored = section.get("optimizer_state", "auto")
    return Earlier(section["engine"], section["base"], stored, state.get("ranks"))


def settle(config: Config, earlier: Earlier | None, world: int) -> Settings:
    """The configuration's settings; open ones as in an earlier start on as many ranks."""
    own = config.sharding
    settings = Settings(own.engine, own.base, own.optimizer_state)
    if own.base != "auto" or earlier is None or earlier.base == "auto":
        return settings
    if earlier.ranks not in (None, world):
        reason = f"chosen again, for {world} rank(s) where the checkpoint has {earlier.ranks}"
        return Settings(own.engine, own.base, own.optimizer_state, reason)
    return Settings(
        own.engine if is_set(config, "sharding.engine") else earlier.engine,
        earlier.base,
        earlier.optimizer_state if own.optimizer_state == "auto" else own.optimizer_state,
        "as in the checkpoint",
    )
