"""Data sets of the Hugging Face hub."""

import functools
import logging
from collections.abc import Iterator
from typing import Any

import datasets
from huggingface_hub.constants import is_offline_mode

from dlora.data.kinds.kind import Faults, Place, Record
from dlora.data.kinds.saved import arrow_digest, chosen, rows
from dlora.errors import UsageError


class Hub:
    """`owner/name`, downloaded once into the cache of `datasets` and memory-mapped from there."""

    name = "a data set of the hub"
    remote = True
    takes = ("split", "name", "revision")
    requires = {"datasets": "'dlora[datasets]'"}

    @staticmethod
    def read(place: Place, faults: Faults) -> Iterator[Record]:
        """The rows, counted from 1."""
        return rows(_loaded(place), place)

    @staticmethod
    def digest(place: Place) -> str:
        """Of the Arrow files that the download was written to."""
        return arrow_digest(_loaded(place))


@functools.lru_cache(maxsize=8)  # the same for its digest and for each epoch
def _loaded(place: Place) -> Any:
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry would be a line
    try:
        found = datasets.load_dataset(
            str(place.path), place.subset, split=place.split, revision=place.revision
        )
    except Exception as error:  # of the network, of the hub, and of every builder
        said = " ".join(str(error).split()) or type(error).__name__
        hint = "; HF_HUB_OFFLINE is set, and it is not in the cache" if is_offline_mode() else ""
        raise UsageError(
            f"{place} is no file or directory here, and cannot be had from the Hugging Face hub"
            f"{hint}: {said[:300]}"
        ) from None
    return chosen(found, place) if isinstance(found, datasets.DatasetDict) else found
