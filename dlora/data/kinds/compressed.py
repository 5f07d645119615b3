"""Files as bytes, also those that gzip or zstd has compressed. Errors name the file.

What ends before its compressed stream does is refused: python-zstandard's own reader would return
the first part of a damaged file without a word.
"""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from dlora.errors import UsageError

ENDINGS = (".gz", ".zst", ".zstd")
PIECE = 1 << 20


class _CutShortError(Exception):
    """A compressed stream does not end."""


@contextmanager
def opened(path: Path | str, where: str) -> Iterator[BinaryIO]:
    """The file's content, decompressed by the end of its name.

    Args:
        where: "key: path", in front of errors, also of those of reading inside the context.

    Raises:
        UsageError: the file cannot be read or decompressed, or a package for that is missing.
    """
    name = str(path).lower()
    try:
        with Path(path).open("rb") as file:
            if name.endswith(".gz"):
                yield cast(BinaryIO, gzip.GzipFile(fileobj=file))
            elif name.endswith((".zst", ".zstd")):
                yield cast(BinaryIO, io.BufferedReader(_ZstdReader(file, where), PIECE))
            else:
                yield file
    except (EOFError, _CutShortError):
        raise UsageError(f"{where}: ends before its compressed data does; copy it anew") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{where}: not gzip data, as its name says ({error})") from None
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror or error}") from None


class _ZstdReader(io.RawIOBase):
    """Frame after frame of a zstd file."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file, self._where = file, where
        self._new, self._error = _decompressor(where)
        self._frame: Any = None
        self._rest, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            piece = self._rest or self._file.read(PIECE)
            self._rest = b""
            if not piece:
                if self._frame is not None:
                    raise _CutShortError
                return 0
            self._ready = memoryview(self._decompress(piece))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, piece: bytes) -> bytes:
        self._frame = self._frame or self._new()
        try:
            found: bytes = self._frame.decompress(piece)
        except self._error as error:
            raise UsageError(f"{self._where}: not zstd data, as its name says ({error})") from None
        if self._frame.eof:
            self._rest, self._frame = self._frame.unused_data, None
        return found


def _decompressor(where: str) -> tuple[Any, type[Exception]]:
    """What makes a decompressor of one frame, and its error: Python's own from 3.14 on."""
    if importlib.util.find_spec("compression") is not None:
        own = importlib.import_module("compression.zstd")
        return own.ZstdDecompressor, own.ZstdError
    try:
        import zstandard
    except ModuleNotFoundError:
        raise UsageError(
            f"{where}: zstd needs Python 3.14 or zstandard: pip install 'dlora[datasets]'"
        ) from None

    def make() -> Any:
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    return make, zstandard.ZstdError
