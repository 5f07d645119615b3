"""Values on the command lines of compose and library, each with an error of one line."""

from __future__ import annotations

import argparse
import math


def whole(least: int = 1):
    """A type for argparse: a whole number of at least `least`."""

    def number(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least}, not {word!r}"
            )
        return int(word)

    return number


def share(word: str) -> float:
    """A number above 0 and at most 1."""
    value = as_number(word)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {word!r}")
    return value


def as_number(word: str) -> float:
    """A number; NaN for a word that is none."""
    try:
        return float(word)
    except ValueError:
        return math.nan
