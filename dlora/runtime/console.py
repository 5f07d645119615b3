"""What a run prints: `console.info` once for all ranks, `console.warning` from the rank itself.

INFO goes to standard output; warnings and errors go to standard error, after `dlora: warning:` and
`dlora: error:`. Rank 0 alone prints what all ranks know.
"""

from __future__ import annotations

import logging
import os
import sys


class _Printer(logging.Handler):
    """Writes to the standard streams that are in place at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        text, stream = record.getMessage(), sys.stdout
        if record.levelno >= logging.WARNING:
            text, stream = f"dlora: {record.levelname.lower()}: {text}", sys.stderr
        print(text, file=stream, flush=True)


def _is_printed(record: logging.LogRecord) -> bool:
    """A warning is about one rank; all else is known to every rank, and rank 0 prints it."""
    return record.levelno == logging.WARNING or os.environ.get("RANK", "0") == "0"


console = logging.getLogger("dlora.console")
console.setLevel(logging.INFO)
console.propagate = False  # the root logger belongs to the program that embeds dlora
console.addFilter(_is_printed)
if not console.handlers:
    console.addHandler(_Printer())
