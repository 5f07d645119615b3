"""How the report writes numbers, and the ticks of its axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

BYTES, SECONDS, SHARE, PLAIN = "bytes", "s", "%", ""
_PREFIXES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def unit_of(name: str) -> str:
    """The unit of a figure by its name in the log."""
    last = name.rpartition("/")[2]
    if last.endswith("bytes"):
        return BYTES
    if last.endswith("seconds"):
        return SECONDS
    is_share = last in ("padding", "mfu") or "accurac" in last or "agreement" in last
    return SHARE if is_share else PLAIN


def shown(value: float, unit: str = PLAIN) -> str:
    """A number with its unit: `1.234`, `12,345`, `2e-4`, `1.2 GB`, `12.3 %`, `0.12 s`."""
    if not math.isfinite(value):
        return "–"
    if unit == BYTES:
        for size, prefix in _PREFIXES:
            if abs(value) >= size:
                return f"{value / size:,.4g} {prefix}"
        return f"{value:,.4g} B"
    if unit == SHARE:
        return f"{100 * value:,.4g} %"
    return f"{_plain(value)} {unit}".strip()


def _plain(value: float) -> str:
    """Four significant digits, whole numbers whole."""
    size = abs(value)
    if value == int(value) and size < 1e12:
        return f"{int(value):,}"
    if 1e-3 <= size < 1e9:
        digits = max(0, 3 - math.floor(math.log10(size)))
        return f"{value:,.{digits}f}"
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two ends, at most `most` + 1 of them."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    raw = span / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((f * power for f in (1, 2, 5, 10) if f * power >= raw), 10 * power)
    if step == 0 or low + step == low:
        return [low, high]
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two positive ends; 2 and 5 times them too, where they are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, (last - first) // 5)
    tens = [10.0**p for p in range(first, last + 1, every) if low <= 10.0**p <= high]
    if len(tens) >= 3:
        return tens
    more = [f * 10.0**p for p in range(first, last + 1) for f in (1, 2, 5)]
    return [t for t in more if low <= t <= high] or [low, high]


def tick_words(values: Sequence[float], unit: str) -> list[str]:
    """What stands at the ticks, with as many digits as tell them apart."""
    words = [shown(v, unit) for v in values]
    if unit in (PLAIN, SECONDS) and len(values) > 1:
        step = min(b - a for a, b in zip(values, values[1:], strict=False))
        top = max(map(abs, values))
        if step > 1e-4 and top < 1e6:
            digits = max(0, -math.floor(math.log10(step) + 1e-9))
            words = [f"{v:,.{digits}f} {unit}".strip() for v in values]
    return words
