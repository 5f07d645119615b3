"""A stop of a run under Ray: it comes to the program that started the run, and all ranks make it.

    SIGTERM, SIGINT ──> the program ──> a flag, an actor beside it <──each step── rank 0

Ray's own answers are to end the program at once (SIGTERM) or the ranks (SIGINT), uncommitted.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

STOPPING = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 5.0  # in which several signals are one, as dlora.train takes them
T = TypeVar("T")


class Flag:
    """An actor: the signal that came, 0 as long as none has."""

    def __init__(self) -> None:
        self._number, self._is_asked = 0, False

    def put(self, number: int) -> bool:
        """Whether ranks have begun to ask."""
        self._number = self._number or number
        return self._is_asked

    def get(self) -> int:
        self._is_asked = True
        return self._number


class Stop:
    """Takes this program's signals from here on.

    The first one stops the run after its step; before its first step, and a second time, later, it
    ends the program at once.

    Attributes:
        flag: what rank 0 asks, for `ray.get(flag.get.remote())`.
    """

    def __init__(self) -> None:
        if not ray.is_initialized():
            ray.init()  # which takes SIGTERM for itself
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        lasting = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        self.flag = ray.remote(Flag).options(scheduling_strategy=here, **lasting).remote()
        self._number, self._first = 0, 0.0
        for number in STOPPING:
            signal.signal(number, self._handle)

    def wait_for(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises; done in another thread, where Ray leaves signals alone."""
        result: Future[T] = Future()

        def run() -> None:
            try:
                result.set_result(work())
            except BaseException as error:
                result.set_exception(error)

        threading.Thread(target=run, name="dlora-fit", daemon=True).start()
        return result.result()

    def status(self, status: int) -> int:
        """The exit status of a run that ended with `status`: 130 after Ctrl-C."""
        stopped = status == 128 + signal.SIGTERM and self._number
        return 128 + self._number if stopped else status

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._number and now - self._first <= GRACE_SECONDS:
            return
        if self._number or not self._is_heard(number):
            os._exit(128 + number)
        self._number, self._first = number, now
        print("stopping after this step; once more ends it at once", flush=True)

    def _is_heard(self, number: int) -> bool:
        """Whether there are ranks that will see the flag."""
        try:
            return bool(ray.get(self.flag.put.remote(number), timeout=GRACE_SECONDS))
        except RayError:
            return False
