"""Which of the target modules get adapters: PEFT's `exclude_modules` and `layers_to_transform`."""

from __future__ import annotations

import re

from dlora.errors import UsageError
from dlora.lora.config import LoraConfig
from dlora.lora.suggest import suggestion


def chosen(paths: list[str], config: LoraConfig) -> list[str]:
    """Those of the target modules that are not excluded and lie in the layers.

    Raises:
        UsageError: with `strict_names`, an entry means none of `paths`.
    """
    return _in_layers(_not_excluded(paths, config), config)


def _not_excluded(paths: list[str], config: LoraConfig) -> list[str]:
    excluded, out = config.exclude_modules, set[str]()
    for entry in [excluded] if isinstance(excluded, str) else excluded or ():
        expression = entry if isinstance(excluded, str) else rf"(.*\.)?{re.escape(entry)}"
        meant = {path for path in paths if re.fullmatch(expression, path)}
        if not meant and config.strict_names:
            raise UsageError(
                f"exclude_modules: {entry!r} matches none of the {len(paths)} target modules"
                f"{suggestion(entry, paths)}"
            )
        out |= meant
    return [path for path in paths if path not in out]


def _in_layers(paths: list[str], config: LoraConfig) -> list[str]:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return paths
    wanted = wanted if isinstance(wanted, list) else [wanted]
    numbers = {path: _layer_number(path, config.layers_pattern) for path in paths}
    for number in wanted:
        if number not in numbers.values() and config.strict_names:
            raise UsageError(f"layers_to_transform: no target module is in block {number}")
    # As in PEFT, a whole path in the list means its module, whatever its block.
    return [p for p in paths if numbers[p] in wanted or p in config.target_modules]


def _layer_number(path: str, lists: str | list[str] | None) -> int | None:
    """PEFT's rule: the first number of a path that follows one of the names, or any two names."""
    found = None
    if lists:
        for name in [lists] if isinstance(lists, str) else lists:
            found = found or re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", path)
    else:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    return int(found[1]) if found else None
