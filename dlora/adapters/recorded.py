"""What an adapter's directory records beside tensors: its base, its labels, how it answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlora.errors import UsageError
from dlora.io.files import inside, read_object, write_atomically

LABELS = "labels.json"  # beside the adapter of a classification: their names, in order


@dataclass(frozen=True)
class BaseReference:
    """What an adapter records of its base; `trust_remote_code` is never taken from a file."""

    path: str | None = None
    revision: str | None = None
    dtype: str | None = None
    cache_dir: str | None = None
    gguf: str | None = None  # the file that `path` was converted from, where it is known


@dataclass(frozen=True)
class Answering:
    """What an adapter records of how it was trained to answer.

    Attributes:
        template: the chat template; None: the base's own.
        variables: defaults of the template's variables.
        ends: tokens that end an answer, beside those of the base.
    """

    template: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    ends: tuple[int, ...] = ()


def write_labels(directory: Path, labels: Sequence[str]) -> None:
    """Write the names of a classification's labels beside its adapter."""
    named = json.dumps({"labels": list(labels)}, ensure_ascii=False)
    write_atomically(directory / LABELS, named.encode())


def template_in(directory: Path) -> str | None:
    """The chat template beside an adapter."""
    path = inside(directory, "chat_template.jinja")
    try:
        return path.read_text(encoding="utf-8") if path.exists() else None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None


def ends_in(directory: Path) -> tuple[int, ...]:
    """The tokens that end an answer, in the generation settings beside an adapter."""
    path = inside(directory, "generation_config.json")
    if not path.exists():
        return ()
    return as_ends(read_object(path).get("eos_token_id"), f"{path}: eos_token_id")


def as_ends(found: Any, where: str) -> tuple[int, ...]:
    """Token ids as a file has them: null, one, or a list.

    Raises:
        UsageError: it is something else.
    """
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(end) is not int or end < 0 for end in ends):
        raise UsageError(f"{where}: {found!r} is neither a token id nor a list of them")
    return tuple(ends)
