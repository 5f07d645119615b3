"""A library of adapters of one base, on disk.

    library.json        the index                       see `index.py`
    objects/<id>/       the files of one adapter        written once, never changed
    active/<name>       a link to the active version    what PEFT, vLLM and dlora can be given
    .lock               held by the one that writes

An object is written beside its name and renamed; then the index is replaced; then the links. A
crash between two of these loses nothing, and the next writer puts the links right. Readers need no
lock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dlora.adapters.diffusers_format import LORA_WEIGHTS
from dlora.adapters.hub import adapter_directory
from dlora.adapters.write import CONFIG, WEIGHTS
from dlora.errors import UsageError, and_more
from dlora.io.files import inside, read_object
from dlora.library.describe import Described, data_of, metrics_of, parents_of
from dlora.library.extracted import RECORD as EXTRACTION
from dlora.library.index import (
    INDEX,
    LONGEST_NAME,
    Entry,
    Index,
    State,
    Version,
    is_name,
    read_index,
)
from dlora.library.objects import OBJECTS, Objects
from dlora.library.result import BESIDE, COMPOSITION
from dlora.library.same_base import (
    Base,
    base_of,
    base_of_record,
    check_same,
    check_shapes,
    with_identity,
)
from dlora.library.stored import check_directory, check_stored, sha256_of, shapes_in
from dlora.runtime.run_lock import NAME, RunLock

FILES = (CONFIG, WEIGHTS, LORA_WEIGHTS, COMPOSITION, EXTRACTION, "README.md", *BESIDE)
PATIENCE_SECONDS = 5.0


class Library:
    """A library; nothing is read until it is asked for.

    Args:
        directory: made by the first `add`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.objects = Objects(self.directory)

    def index(self) -> Index:
        """What the library has.

        Raises:
            UsageError: there is no library, or its index is damaged.
        """
        if not (self.directory / INDEX).is_file():
            raise UsageError(self._no_index())
        return read_index(self.directory)

    def _no_index(self) -> str:
        if (self.directory / OBJECTS).exists():
            return f"{self.directory}: has lost its {INDEX}; its objects are there, unchanged"
        return f"{self.directory}: has no {INDEX}, so it is no library of adapters"

    def find(self, name: str) -> tuple[Path, Base] | None:
        """The directory of `NAME` or `NAME@VERSION`, checked, and its base; None: there is none.

        Raises:
            UsageError: the version is not there, or its files are not what was added.
        """
        index = self.index()
        if name.partition("@")[0] not in index.adapters:
            return None
        name, version = self.version(index, name)
        return self.objects.checked(name, version), base_of_record(version.base)

    def version(self, index: Index, name: str) -> tuple[str, Version]:
        """The name and the version that `NAME` (the active one) or `NAME@VERSION` means."""
        name, at, wanted = name.partition("@")
        entry = self.entry(index, name)
        if not at and entry.active is None:
            raise UsageError(f"{self.directory}: {name} is removed; rollback brings it back")
        number = str(entry.active) if not at else wanted
        version = next((v for v in entry.versions if str(v.number) == number), None)
        if version is None:
            have = ", ".join(str(version.number) for version in entry.versions)
            said = wanted[:20] or "without a number"
            raise UsageError(f"{self.directory}: {name} has no version {said}; it has {have}")
        return name, version

    def entry(self, index: Index, name: str) -> Entry:
        """What the index has under a name."""
        if name not in index.adapters:
            have = and_more(sorted(index.adapters), 5) or "none yet"
            raise UsageError(f"{self.directory}: has no adapter {name!r}; it has {have}")
        return index.adapters[name]

    def add(self, directory: str | Path, name: str, said: Described, *, activate: bool) -> Version:
        """Add an adapter as the next version of `name`.

        Args:
            activate: others read it from now on; the first version is active anyway.

        Raises:
            UsageError: it is no adapter, or one of another base, or the version is there already.
        """
        if not is_name(name):
            raise UsageError(
                f"--name: {name[:80]!r}: at most {LONGEST_NAME} letters, digits, '.', '_' and '-' "
                "make a name"
            )
        source = adapter_directory(directory, "library add")
        check_directory(source, "library add")
        check_stored(source)
        base, shapes = self._base(source, said.base), shapes_in(inside(source, WEIGHTS))
        found = {file: inside(source, file) for file in FILES}
        paths = {file: path for file, path in found.items() if path.is_file()}
        with self._writing(Index(base)) as index:
            self._check_base(index, source, base, shapes)
            self.objects.check_links([name])
            entry = index.adapters.setdefault(name, Entry())
            version = Version(
                number=max((v.number for v in entry.versions), default=0) + 1,
                files={file: sha256_of(path) for file, path in paths.items()},
                added=_now(),
                base=base.record(),
                parents=self._parents(index, source, said.parents),
                data=data_of(source),
                metrics={**metrics_of(source), **said.metrics},
                tags=list(said.tags),
            )
            same = [v for v in entry.versions if v.object == version.object]
            whole = self.objects.write(name, version, paths)
            if same and whole:
                raise UsageError(f"library add: {source} is {name}@{same[0].number} already")
            if same:
                return same[0]  # it was damaged, and is whole again
            entry.versions.append(version)
            active = entry.history[-1].active if entry.history else None
            now = version.number if activate or active is None else active
            entry.history.append(State("add", version.added, now))
            index.shapes |= shapes
        return version

    def activate(self, name: str, number: int) -> None:
        """Let others read a version of `name`."""
        with self._writing() as index:
            entry = self.entry(index, name)
            _, version = self.version(index, f"{name}@{number}")
            if entry.active == number:
                raise UsageError(f"{self.directory}: {name}@{number} is active already")
            self.objects.checked(name, version)
            entry.history.append(State("activate", _now(), number))

    def rollback(self, name: str, state: int | None) -> int:
        """Go back to a state of the history of `name`, by default the one before the present one.

        Args:
            state: from 1, as `show` counts them.

        Returns:
            The version that is active now.

        Raises:
            UsageError: there is no such state, or the version it had is damaged.
        """
        with self._writing() as index:
            entry = self.entry(index, name)
            history = entry.history
            places = [p for p in range(entry.present - 1, -1, -1) if history[p].active is not None]
            place = state - 1 if state is not None else next(iter(places), None)
            if place is None:
                raise UsageError(f"{self.directory}: {name} has no earlier state to go back to")
            if not 0 <= place < len(history) or (number := history[place].active) is None:
                raise UsageError(
                    f"{self.directory}: {name} has no state {place + 1} with a version to go back "
                    "to; `dlora library show` lists them"
                )
            self.objects.checked(*self.version(index, f"{name}@{number}"))
            while (to := history[place].to) is not None:
                place = to
            history.append(State("rollback", _now(), number, place))
            return number

    def remove(self, name: str, *, purge: bool) -> None:
        """Take a name out; its versions stay for `rollback`.

        Args:
            purge: delete versions, history, and the files that no other version has.
        """
        with self._writing() as index:
            entry = self.entry(index, name)
            if purge:
                del index.adapters[name]
            elif entry.active is None:
                raise UsageError(f"{self.directory}: {name} is removed already; --purge deletes it")
            else:
                entry.history.append(State("remove", _now(), None))

    @contextmanager
    def _writing(self, new: Index | None = None) -> Iterator[Index]:
        """Inside, this process alone changes the index, which is written at the end.

        Args:
            new: the index of a library that is not there yet; None: it must be.
        """
        exists = (self.directory / INDEX).is_file()
        if not exists and (new is None or (self.directory / OBJECTS).exists()):
            raise UsageError(self._no_index())
        if not exists and _is_foreign(self.directory):
            raise UsageError(
                f"{self.directory}: is not empty, and no library; name a new directory"
            )
        lock = self._locked()
        try:
            # What another process wrote until now counts, so it is read under the lock.
            there = (self.directory / INDEX).is_file()
            index = self.index() if there or new is None else new
            if not there:  # first: objects without an index are a library that lost it
                index.write(self.directory)
            self.objects.prepare()
            self.objects.check_links(index.active())
            before = index.objects()
            yield index
            lock.check()
            index.write(self.directory)
            self.objects.link(index.active())
            self.objects.delete(before - index.objects())  # that the index no longer names
        except OSError as error:
            raise UsageError(
                f"{self.directory}: cannot be written: {error.strerror or error}"
            ) from error
        finally:
            lock.release()

    def _locked(self) -> RunLock:
        """The lock of the library; others write for moments only, so it is waited for."""
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            lock = RunLock(self.directory, key="library")
            try:
                lock.take()
                return lock
            except UsageError:
                if time.monotonic() > until:
                    raise

    def _base(self, source: Path, override: str | None) -> Base:
        base = base_of(source, read_object(inside(source, CONFIG)))
        if override is not None:
            base = Base(override, None, base.identity)
        return with_identity(base)

    def _check_base(self, index: Index, source: Path, base: Base, shapes: Any) -> None:
        """Check that an adapter is one of the library's base, whose identity it may tell."""
        check_same(str(self.directory), index.base, str(source), base)
        check_shapes(str(self.directory), index.shapes, str(source), shapes)
        if not index.base.identity or not index.base.path:
            known = index.base
            index.base = Base(
                known.path or base.path, known.revision, known.identity or base.identity
            )

    def _parents(self, index: Index, source: Path, given: Sequence[str]) -> list[dict[str, Any]]:
        if given:
            found = [self.version(index, name) for name in given]
            return [{"name": name, "version": version.number} for name, version in found]
        known = [
            (name, version.number, version.files.get(WEIGHTS))
            for name, entry in index.adapters.items()
            for version in entry.versions
        ]
        return parents_of(source, known)


def _is_foreign(directory: Path) -> bool:
    """Whether a directory has what a library that is being made has not."""
    return directory.is_dir() and any(path.name != NAME for path in directory.iterdir())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
