"""Whether adapters belong to one base: by its identity, else by its name, and always by shapes.

A run of dlora records the identity of its base in its checkpoints, and a base that is here has one
(`dlora.base.identity`). PEFT's files record only a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlora.base.identity import identity
from dlora.base.model import find_base
from dlora.checkpoint.listing import steps_in
from dlora.errors import UsageError, and_more
from dlora.io.files import read_object


@dataclass(frozen=True)
class Base:
    """What is known of an adapter's base.

    Attributes:
        path: hub id or absolute directory, as the adapter names it.
        identity: SHA-256 of configuration and sampled weights.
    """

    path: str | None = None
    revision: str | None = None
    identity: str | None = None

    def __str__(self) -> str:
        named = self.path or "a base without a name"
        return named + (f" (identity {self.identity[:12]})" if self.identity else "")

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def base_of(directory: Path, settings: Mapping[str, Any]) -> Base:
    """The base that an adapter's files name, with the identity that its run recorded, if it did.

    Args:
        settings: `adapter_config.json`.
    """
    path, revision = settings.get("base_model_name_or_path") or None, settings.get("revision")
    recorded = run_state(directory).get("base")
    return Base(path, revision, recorded if isinstance(recorded, str) else None)


def run_state(directory: Path) -> dict[str, Any]:
    """`state.json` of the newest checkpoint of the run that wrote the adapter in `directory`."""
    if not (directory.parent / "config.yaml").is_file():
        return {}
    for _, checkpoint in reversed(steps_in(directory.parent / "checkpoints")):
        try:
            return read_object(checkpoint / "state.json")
        except UsageError:  # unfinished or damaged: an older one knows it as well
            continue
    return {}


def with_identity(base: Base) -> Base:
    """The same base with its identity, where its files are here; the network is not used."""
    if base.identity or not base.path or not Path(base.path).expanduser().is_dir():
        return base
    try:
        found = find_base(base.path, revision=base.revision)
        known = identity(found, found.skeleton())
    except UsageError:  # it is no model any more; then its name has to do
        return base
    return Base(base.path, base.revision, known)


def common_base(bases: Mapping[str, Base]) -> Base:
    """The one base of several adapters.

    Args:
        bases: by the adapters' directories.

    Raises:
        UsageError: two of them are known to differ, or may.
    """
    if len({(base.path, base.revision) for base in bases.values()}) > 1:
        bases = {name: with_identity(base) for name, base in bases.items()}
    named = list(bases.items())
    for place, (name, base) in enumerate(named):
        for first, known in named[:place]:
            check_same(first, known, name, base)
    return max(bases.values(), key=lambda base: (bool(base.identity), bool(base.path)))


def check_same(first: str, known: Base, name: str, base: Base) -> None:
    """Raise a `UsageError` if the base of `name` is, or may be, another than that of `first`."""
    if known.identity and base.identity:
        if known.identity != base.identity:
            raise UsageError(f"{name} is an adapter of {base}, but {first} is one of {known}")
    elif known.path and base.path and (known.path, known.revision) != (base.path, base.revision):
        raise UsageError(
            f"{name} is an adapter of {base}, but {first} is one of {known}; --base PATH says that "
            "both are the same"
        )


def base_of_record(record: Mapping[str, Any]) -> Base:
    """The base of `Base.record`.

    Raises:
        KeyError, TypeError: it is none.
    """
    found = [record[key] for key in ("path", "revision", "identity")]
    if not all(value is None or isinstance(value, str) for value in found):
        raise TypeError(f"the base {found}")
    return Base(*found)


def base_line(base: Base, bases: Iterable[Base]) -> str:
    """How it is known that adapters belong to `base`."""
    unknown = sum(1 for one in bases if not one.identity)
    how = f"; {unknown} of the adapters record no identity: by its name and by shapes"
    return f"base: {base}{how if unknown else ''}"


Shapes = Mapping[str, Sequence[int]]  # {path: [m, n]}, see `shapes_in`


def check_shapes(first: str, known: Shapes, name: str, shapes: Shapes) -> None:
    """Raise a `UsageError` about a weight that both adapt, in different shapes."""
    for path in known.keys() & shapes.keys():
        if list(known[path]) != list(shapes[path]):
            raise UsageError(
                f"{name} is an adapter of another base than {first}: {path} is "
                f"{list(shapes[path])}, not {list(known[path])}"
            )


def apart_line(adapters: Mapping[str, Shapes]) -> str | None:
    """What to say of adapters that have no weight in common: they may name them differently."""
    alone = [
        name
        for name, shapes in adapters.items()
        if len(adapters) > 1
        and not any(shapes.keys() & other.keys() for n, other in adapters.items() if n != name)
    ]
    return f"no other adapter adapts a weight of {and_more(alone)}" if alone else None
