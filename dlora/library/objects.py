"""The files of a library: objects by their content, and links to those that are active.

objects/<id>/     the files of one adapter; id is that of `Version.object`
active/<name>     a link to one of them
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from dlora.errors import UsageError
from dlora.io.files import clear, inside, new_directory, sync, unused_name
from dlora.library.index import INDEX, Version
from dlora.library.stored import sha256_of

OBJECTS, ACTIVE = "objects", "active"


class Objects:
    """The objects of the library in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def place(self, version: Version) -> Path:
        """The directory of a version's files."""
        return self.directory / OBJECTS / version.object

    def checked(self, name: str, version: Version) -> Path:
        """`place`, after a check that its files are those that were added.

        Raises:
            UsageError: one is missing or has another content.
        """
        place = self.place(version)
        for file, digest in version.files.items():
            path = inside(place, file)
            wrong = "is missing" if not path.is_file() else None
            if wrong is None and sha256_of(path) != digest:
                wrong = "is not what was added"
            if wrong:
                raise UsageError(
                    f"{path} of {name}@{version.number} {wrong}; add the adapter again to repair it"
                )
        return place

    def prepare(self) -> None:
        """Make the folders, and delete what a writer that died left half written."""
        (self.directory / OBJECTS).mkdir(exist_ok=True)
        clear(self.directory / OBJECTS, ".*.tmp")
        for left in self.directory.glob(f".{INDEX}.*.tmp"):
            left.unlink()

    def write(self, name: str, version: Version, paths: Mapping[str, Path]) -> bool:
        """Write a version's files from `paths`; whether they were there already, whole."""
        place = self.place(version)
        if place.exists():
            try:
                self.checked(name, version)
                return True
            except UsageError:  # damaged: it stays, under another name
                os.replace(place, unused_name(place))
        with new_directory(place) as folder:
            for file, path in paths.items():
                shutil.copyfile(path, folder / file)
                if sha256_of(folder / file) != version.files[file]:
                    raise UsageError(f"library add: {path} changed while it was read; try again")
        return False

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects that no version has."""
        for name in names:
            shutil.rmtree(self.directory / OBJECTS / name, ignore_errors=True)

    def check_links(self, active: Iterable[str]) -> None:
        """Raise a `UsageError` if something else is in the place of a link, or of their folder."""
        links = self.directory / ACTIVE
        strange = [links] if links.is_symlink() or (links.exists() and not links.is_dir()) else []
        strange += [links / name for name in active if _is_no_link(links / name)]
        if strange:
            raise UsageError(f"{strange[0]}: was not made by the library; move it away first")

    def link(self, active: Mapping[str, Version]) -> None:
        """Let `active/<name>` be links to these versions, and to nothing else."""
        links = self.directory / ACTIVE
        links.mkdir(exist_ok=True)
        for link in links.iterdir():
            if link.is_symlink() and link.name not in active:
                link.unlink()
        for name, version in active.items():
            link, target = links / name, f"../{OBJECTS}/{version.object}"
            if link.is_symlink() and str(link.readlink()) == target:
                continue
            beside = links / f".{name}.tmp"  # the lock is ours, so nobody else writes it
            beside.unlink(missing_ok=True)
            beside.symlink_to(target, target_is_directory=True)
            os.replace(beside, link)
        sync(links)


def _is_no_link(path: Path) -> bool:
    return path.exists() and not path.is_symlink()
