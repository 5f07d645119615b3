"""What a library records of an adapter beside its files: read where its run left it.

<run>/adapter/          the adapter         its base, r, targets
<run>/checkpoints/      state.json          identity of the base, fingerprint of the data
<run>/metrics.jsonl                         the last loss, and the last held-out figures
<run>/config.yaml       adapter.path        the adapter that training began with
composition.json        beside the adapter  the adapters of a mix
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dlora.adapters.write import WEIGHTS
from dlora.errors import UsageError
from dlora.io.files import read_object
from dlora.library.result import COMPOSITION
from dlora.library.same_base import run_state
from dlora.library.stored import sha256_of
from dlora.metrics.log import read_metrics


@dataclass(frozen=True)
class Described:
    """What is said of an adapter when it is added, beside what its run recorded."""

    parents: Sequence[str] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Sequence[str] = ()
    base: str | None = None


def data_of(directory: Path) -> str | None:
    """The fingerprint of the data that the adapter was trained on."""
    data = run_state(directory).get("data")
    found = data.get("fingerprint") if isinstance(data, dict) else None
    return found if isinstance(found, str) else None


def metrics_of(directory: Path) -> dict[str, float]:
    """`step`, `loss` and the figures of the last evaluation, of the run that wrote the adapter."""
    path = directory.parent / "metrics.jsonl"
    if not path.is_file() or not (directory.parent / "config.yaml").is_file():
        return {}
    found: dict[str, float] = {}
    for line in read_metrics(path):
        for key, value in line.items():
            is_wanted = key in ("step", "loss") or key.startswith("eval_")
            if is_wanted and isinstance(value, int | float) and math.isfinite(value):
                found[key] = value
    return found


def origins_of(directory: Path) -> list[dict[str, Any]]:
    """What the adapter was made from: {path, and sha256 or weight where they are known}."""
    if (record := directory / COMPOSITION).is_file():
        mixed = read_object(record).get("adapters")
        if not isinstance(mixed, list) or not all(isinstance(one, dict) for one in mixed):
            raise UsageError(f"{record}: adapters: is no list of adapters")
        return [{key: one.get(key) for key in ("path", "sha256", "weight")} for one in mixed]
    try:
        config = yaml.safe_load((directory.parent / "config.yaml").read_text(encoding="utf-8"))
        path = config["adapter"]["path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
        return []
    if not isinstance(path, str):
        return []
    file = Path(path).expanduser() / WEIGHTS
    return [{"path": path, **({"sha256": sha256_of(file)} if file.is_file() else {})}]


def parents_of(
    directory: Path, known: Iterable[tuple[str, int, str | None]]
) -> list[dict[str, Any]]:
    """`origins_of`, by name and version where the library has them.

    Args:
        known: (name, version, SHA-256 of its tensors' file) of all that the library has.
    """
    by_digest = {digest: (name, number) for name, number, digest in known if digest}
    parents = []
    for origin in origins_of(directory):
        digest = origin.pop("sha256", None)
        if digest in by_digest:
            name, number = by_digest[digest]
            origin = {"name": name, "version": number, "weight": origin.get("weight")}
        parents.append({key: value for key, value in origin.items() if value is not None})
    return parents
