"""Stops a run under Ray: the program that started it gets the signal, and all ranks stop.

    SIGTERM, SIGINT ──> the program ──> a flag, an actor beside it ──> rank 0, which waits for it

Ray's own answers are to end the program at once (SIGTERM) or the ranks (SIGINT), uncommitted.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError
from ray.train import UserCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

STOPPING = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 5.0  # in which several signals are one, as dlora.train takes them
T = TypeVar("T")


class Flag:
    """An actor with the signal that the program got."""

    def __init__(self) -> None:
        self._number, self._is_waited_for = 0, False
        self._has_come = asyncio.Event()

    async def put(self, number: int) -> bool:
        """Set the signal; returns whether ranks wait for it."""
        self._number = self._number or number
        self._has_come.set()
        return self._is_waited_for

    async def get(self) -> int:
        """Wait for the signal and return it; a rank looks for the answer at the end of a step."""
        self._is_waited_for = True
        await self._has_come.wait()
        return self._number

    async def forget(self) -> None:
        """Note that the ranks are gone; others may follow."""
        self._is_waited_for = False


class Forgetting(UserCallback):
    """Tells a flag that ranks were lost, so that a signal ends a run that waits for room."""

    def __init__(self, flag: Any) -> None:
        self._flag = flag

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        self._flag.forget.remote()


class Stop:
    """Takes this program's signals from here on.

    The first one stops the run after its step; where no ranks are there, before a first step or
    while Ray waits for room, and a second time, later, it ends the program at once.

    Attributes:
        flag: what rank 0 waits for, with `flag.get.remote()`.
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
        """Run `work` in another thread, so that Ray does not handle signals; returns its result."""
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
        print("stopping after this step; a second signal ends the run at once", flush=True)

    def _is_heard(self, number: int) -> bool:
        """Whether there are ranks that will see the flag."""
        try:
            return bool(ray.get(self.flag.put.remote(number), timeout=GRACE_SECONDS))
        except RayError:
            return False
