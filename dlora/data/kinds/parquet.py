"""Parquet files."""

from collections.abc import Iterator

import pyarrow
import pyarrow.parquet

from dlora.data.kinds.kind import Faults, Place, Record, file_digest
from dlora.errors import UsageError

_ROWS = 64  # made Python objects at one time


class Parquet:
    """The rows of a Parquet file; nested columns are objects and lists."""

    name = "Parquet"
    suffixes = (".parquet", ".pq")
    requires = {"pyarrow": "'dlora[datasets]'"}

    @staticmethod
    def read(place: Place, faults: Faults) -> Iterator[Record]:
        """The rows, counted from 1."""
        number = 0
        try:
            # Mapped and not fetched ahead: pages stay the file's, and memory is that of a batch.
            options = {"memory_map": True, "pre_buffer": False}
            with pyarrow.parquet.ParquetFile(place.path, **options) as file:
                for batch in file.iter_batches(_ROWS, use_threads=False):
                    for row in batch.to_pylist():
                        number += 1
                        yield Record(row, f"{place}: row {number}", place.part)
        except (pyarrow.ArrowException, OSError) as error:
            behind = f" behind row {number}" if number else ""
            raise UsageError(f"{place}: cannot be read as Parquet{behind}: {error}") from None

    @staticmethod
    def digest(place: Place) -> str:
        """Of the bytes."""
        return file_digest(place.path)
