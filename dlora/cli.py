"""What the small commands (export, generate) share: their parser, and finding base and adapter."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from dlora.adapters.source import AdapterSource, BaseReference
from dlora.base.model import BaseModel, find_base
from dlora.errors import UsageError


class OneLineParser(argparse.ArgumentParser):
    """argparse with an error of one line in place of its usage text."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists the options)")


@contextmanager
def naming_base(option: str) -> Iterator[None]:
    """Inside, what is wrong with the base is said of `option`; there is no `model.path` here."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{option}: {str(error).removeprefix('model.path: ')}") from error


def chosen_base(
    override: str | None,
    source: AdapterSource | None,
    *,
    dtype: str | None,
    trust_remote_code: bool,
    announce: Callable[[str], None],
) -> tuple[BaseModel, str]:
    """The base of `--base`, or else the one that the adapter records, and how to call it in errors.

    Args:
        dtype: of the base; None takes the run's that a checkpoint records, else bfloat16.
    """
    recorded = source.base if source else BaseReference()
    option = "--base"
    if override is None:
        if source is None:
            raise UsageError("give --base, --adapter, or both")
        if not recorded.path:
            raise UsageError(f"{source.directory} does not say which base it is for; add --base")
        option = f"the base of {source.directory} (--base overrides it)"
    path = override or recorded.path
    assert path is not None
    # A revision belongs to the base that was recorded, a place for conversions to any.
    revision = recorded.revision if path == recorded.path else None
    if trust_remote_code and path.endswith(".gguf"):
        raise UsageError("--trust-remote-code cannot act: a .gguf file brings no code")
    with naming_base(option):
        base = find_base(
            path,
            dtype=dtype or recorded.dtype or "bfloat16",
            revision=revision,
            trust_remote_code=trust_remote_code,
            cache_dir=recorded.cache_dir or "~/.cache/dlora",
            announce=announce,
        )
        base.config()
    return base, option
