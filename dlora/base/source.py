"""Where the files of a base are: all that reading them needs to know."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BaseSource:
    """The place of a base's files; nothing is read until they are opened.

    Attributes:
        path: as the user wrote it; errors name it.
        source: the directory or hub id that transformers reads, and that adapters record; of a
            `.gguf` file, the directory that it was converted to.
        dtype: in which the weights are loaded.
        revision: of a hub id.
    """

    path: str
    source: str
    dtype: torch.dtype
    revision: str | None = None
