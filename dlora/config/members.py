"""One of the adapters that a run trains together, as the file names it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ADAPTERS = "adapters"  # the key of the list, and the directory of what each of them writes


@dataclass(frozen=True)
class Member:
    """An entry of `adapters`.

    Attributes:
        name: of the adapter, and of its directory.
        values: what it sets for itself, by dotted key.
    """

    name: str
    values: Mapping[str, Any]
