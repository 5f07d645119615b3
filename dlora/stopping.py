"""SIGTERM and SIGINT: finish the step, commit, and exit with 143 or 130."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

GRACE_SECONDS = (
    5.0  # signals this close together are one: launchers forward what the shell sent too
)


class StopRequest:
    """Remembers a stop signal until the loop looks; a second one, later, ends the process."""

    def __init__(self) -> None:
        self.signal = 0
        self._first = 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal and now - self._first > GRACE_SECONDS:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self._first = number, now

    @property
    def flags(self) -> list[float]:
        """[SIGTERM seen, SIGINT seen], to be summed over ranks."""
        return [float(self.signal == signal.SIGTERM), float(self.signal == signal.SIGINT)]


def exit_status(flags: list[float]) -> int | None:
    """143 where any rank saw SIGTERM, 130 where any saw SIGINT, None where none saw a signal."""
    terminated, interrupted = flags
    if terminated:
        return 128 + signal.SIGTERM
    return 128 + signal.SIGINT if interrupted else None
