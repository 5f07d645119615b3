"""`sharding.activation_checkpointing`: which blocks compute their activations again in backward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LEAST_OFTEN = 8  # `auto` tries every 8th block first


@dataclass(frozen=True)
class Recompute:
    """What blocks keep from forward to backward.

    Attributes:
        every: each so many-th block, the first among them, keeps its input alone; 0: none does.
        offload: these inputs lie in host memory meanwhile.
    """

    every: int = 0
    offload: bool = False

    @classmethod
    def of(cls, setting: Any) -> Recompute:
        """What a setting means that `problem` finds nothing wrong with; not `auto`."""
        if isinstance(setting, Mapping):
            return cls(int(setting.get("every", 1)), bool(setting.get("offload", False)))
        return cls(int(setting))

    def __bool__(self) -> bool:
        return self.every > 0

    def __str__(self) -> str:
        if not self:
            return "saved for backward"
        which = "" if self.every == 1 else f" in one block of {self.every}"
        where = ", their inputs in host memory" if self.offload else ""
        return f"recomputed in backward{which}{where}"


def problem(setting: Any) -> str:
    """What is wrong with a setting of the right type; nothing if it is right."""
    if not isinstance(setting, Mapping):
        return ""
    if len(setting) != 1 or not setting.keys() <= {"every", "offload"}:
        return f"expected {{every: k}} or {{offload: true}}, got {dict(setting)}"
    [(name, value)] = setting.items()
    if name == "offload" and value is not True:
        return f"offload: expected true, got {value}"
    if name == "every" and (isinstance(value, bool) or value < 1):
        return f"every: expected a number of blocks >= 1, got {value}"
    return ""


def ways(setting: Any, device: str) -> Iterator[Recompute]:
    """What a setting allows, the cheapest first: less is computed again, then less is copied."""
    if setting != "auto":
        yield Recompute.of(setting)
        return
    yield Recompute()
    every = LEAST_OFTEN
    while every:
        yield Recompute(every)
        every //= 2
    if device != "cpu":
        yield Recompute(1, offload=True)
