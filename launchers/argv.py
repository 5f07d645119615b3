"""Command lines, taken apart and passed on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator


def words_of(argv: list[str], *options: type) -> Iterator[tuple[str, str | None]]:
    """(name, value) of each option of a command line that was understood; None for a switch.

    Args:
        options: the dataclasses that declare options beside the configuration's.
    """
    fields = [field for cls in options for field in dataclasses.fields(cls)]
    switches = {spelled(f.name) for f in fields if f.type in (bool, "bool")}
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if name in switches:
            yield name, None
        else:
            yield name, value if equals else next(words)


def names_of(*options: type) -> set[str]:
    """The names that the dataclasses themselves declare, and not those they derive from."""
    return {spelled(name) for cls in options for name in cls.__dict__.get("__annotations__", {})}


def spelled(field: str) -> str:
    """A field's name on a command line: `num_workers` → `num-workers`."""
    return field.replace("_", "-")


def word(name: str, value: str | None) -> str:
    """An option as one word of a command line."""
    return f"--{name}" if value is None else f"--{name}={value}"
