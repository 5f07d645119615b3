"""Directories that `datasets.save_to_disk` wrote."""

from collections.abc import Iterator
from typing import Any

import datasets

from dlora.data.kinds.kind import Faults, Place, Record, file_digest
from dlora.errors import UsageError

_ROWS = 256  # made Python objects at one time


class Saved:
    """A `Dataset`, or a `DatasetDict` of which `split` names one. Arrow files are memory-mapped."""

    name = "a saved data set"
    markers = ("state.json", "dataset_dict.json")
    takes = ("split",)
    requires = {"datasets": "'dlora[datasets]'"}

    @staticmethod
    def read(place: Place, faults: Faults) -> Iterator[Record]:
        """The rows, counted from 1."""
        return rows(_loaded(place), place)

    @staticmethod
    def digest(place: Place) -> str:
        """Of the Arrow files of the split."""
        return arrow_digest(_loaded(place))


def _loaded(place: Place) -> Any:
    try:
        found = datasets.load_from_disk(place.path)
    except Exception as error:  # whatever `datasets` makes of a damaged directory
        raise UsageError(f"{place}: cannot be read by datasets: {_first_line(error)}") from None
    if isinstance(found, datasets.DatasetDict):
        return chosen(found, place)
    if place.split is not None:
        raise UsageError(f"{place}: split: {place.split} cannot act: the data set has no splits")
    return found


def chosen(splits: Any, place: Place) -> Any:
    """The split of a `DatasetDict` that the user means.

    Without a name it is the only one, or of `data.train` the one named train.

    Raises:
        UsageError: it is not there, or could be several.
    """
    wanted = place.split
    if wanted is None and len(splits) == 1:
        return next(iter(splits.values()))
    if wanted is None and place.key == "data.train" and "train" in splits:
        wanted = "train"
    if wanted not in splits:
        said = f"has no split {wanted!r}" if wanted else "has several splits"
        raise UsageError(
            f"{place}: {said}; choose one of {', '.join(splits)}: "
            f"{{path: {place.path}, split: {next(iter(splits))}}}"
        )
    return splits[wanted]


def rows(dataset: Any, place: Place) -> Iterator[Record]:
    """The rows of a `datasets.Dataset` as records."""
    number = 0
    try:
        for columns in dataset.with_format(None).iter(_ROWS):
            names = list(columns)
            for cells in zip(*columns.values(), strict=True):
                number += 1
                row = dict(zip(names, cells, strict=True))
                yield Record(row, f"{place}: row {number}", place.part)
    except (OSError, ImportError) as error:  # a picture or a sound needs a package to be decoded
        behind = f" behind row {number}" if number else ""
        raise UsageError(f"{place}: cannot be read{behind}: {_first_line(error)}") from None


def arrow_digest(dataset: Any) -> str:
    """Of the bytes of a data set's Arrow files, and of what was taken of them."""
    files = [file_digest(file["filename"]) for file in dataset.cache_files]
    return " ".join([*files, str(dataset.split), str(len(dataset))])


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
