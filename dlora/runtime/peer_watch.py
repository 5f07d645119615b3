"""Lost peers: where one dies or hangs, each of the others commits its last whole step and ends.

    main thread     waits in a collective, or on CUDA in the copy that waits for one: under NCCL
                    nothing is ever raised there
    watch thread    beats in the store; while this rank is quiet, it reads the beats of the others
                    ├─ a rank has reported an error, or gives no sign of life
                    └─ nothing has moved for `sharding.timeout_seconds`
                    ──> commit, name who is lost, exit status 1

Under NCCL torch's own watchdog would end the process with SIGABRT and nothing committed, so
`Ranks.join` turns its handling of errors off.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from dlora.runtime import failure
from dlora.runtime.ranks import Ranks

MOST_BETWEEN_BEATS = 2.0  # seconds
QUIET_SECONDS = 5.0  # without progress, after which reports of other ranks are looked for
MOST_WITHOUT_LIFE = 60.0  # seconds without a beat, after which a rank is lost
LEFT = "left"  # in place of the beat of a rank that ends by itself
T = TypeVar("T")


class Commit(Protocol):
    """Saves the last whole step without other ranks; returns a line about it.

    Args:
        ending: whether the process is about to end.
    """

    def __call__(self, *, ending: bool) -> str: ...


class PeerWatch:
    """Watches the ranks of one run from a thread of this one."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        # Of its own, since a store's client answers one question at a time.
        self._store: Any = None if ranks.store is None else ranks.store.clone()  # type: ignore[attr-defined]
        self._asking: threading.Thread | None = None
        self._others = [rank for rank in range(ranks.world) if rank != ranks.rank]
        self._passes, self._last = 0, time.monotonic()
        self._answered = time.monotonic()  # when the store did so last
        self._seen: dict[int, tuple[str, float]] = {}  # by rank: its beat, and when it was new
        self._is_judging, self._is_waiting = False, False

    def beat(self) -> None:
        """Record progress; every pass of the model calls it."""
        self._passes, self._last = self._passes + 1, time.monotonic()

    @contextlib.contextmanager
    def watching(self, limit: float, commit: Commit | None = None) -> Iterator[None]:
        """Inside, this rank ends where a peer is lost.

        Args:
            limit: seconds in which something has to move on this rank.
            commit: None while weights are read: there is nothing to save, and a rank whose disk
                stalls may give no sign of life.
        """
        if self._store is None:
            yield
            return
        self.beat()
        ended = threading.Event()
        self._is_judging = True
        arguments = (ended, limit, commit)
        thread = threading.Thread(
            target=self._watch, args=arguments, name="dlora-peers", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(failure.ANSWER_SECONDS)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this rank may be quiet for as long as the others live."""
        before, self._is_waiting = self._is_waiting, True
        try:
            yield
        finally:
            self.beat()
            self._is_waiting = before

    def lost(self) -> str:
        """Who is lost, once this rank knows that somebody is: those whose beats have stopped.

        From here on it is the caller who ends this rank.
        """
        self._is_judging = False
        if self._store is None:
            return ""
        if crash := self._ask(failure.crash):
            self._ranks.part(failure.CRASH)
            return crash
        between = self._between(self._ranks.timeout_seconds)
        self._see_beats()
        before, until = self._beats(), time.monotonic() + 3 * between
        silent = self._others
        while silent and time.monotonic() < until:
            time.sleep(between / 4)
            self._see_beats()
            now = self._beats()
            silent = [r for r in silent if now[r] == before[r] != LEFT]
        if time.monotonic() - self._answered > between:
            return self._without_store()
        self._ask(functools.partial(self._put, LEFT))
        return f"{self._named(silent)} gives no sign of life" if silent else ""

    # -- the thread -----------------------------------------------------------------------------

    def _watch(self, ended: threading.Event, limit: float, commit: Commit | None) -> None:
        beats = 0
        while not ended.wait(self._between(limit)):
            beats += 1
            beat = f"{beats} {self._passes}"
            if self._is_judging:
                self._ask(functools.partial(self._put, beat))
            silence = time.monotonic() - self._last
            if silence < min(QUIET_SECONDS, limit / 2) or not self._is_judging:
                continue
            if (found := self._ask(failure.read_now)) and silence > 2 * QUIET_SECONDS:
                os._exit(1 if found[1] else 2)  # its rank has printed it
            reason = self._reason(silence, limit, commit is not None)
            if reason is not None and not ended.is_set() and self._is_judging:
                self._end(reason, commit)

    def _reason(self, silence: float, limit: float, by_life: bool) -> str | None:
        """Why this rank has to end, or None."""
        if crash := self._ask(failure.crash):
            return crash
        patience = min(MOST_WITHOUT_LIFE, limit / 2)
        if silence > patience / 2:
            self._see_beats()
        now = time.monotonic()
        if by_life and silence > patience:
            if now - self._answered > patience:
                return self._without_store()
            gone = [
                r for r, (beat, new) in self._seen.items() if now - new > patience and beat != LEFT
            ]
            if gone:
                return f"{self._named(gone)} gives no sign of life"
        has_time = silence < limit or self._is_waiting
        return None if has_time else f"nothing moved for {limit:g} s; {self._hindmost()}"

    def _end(self, reason: str, commit: Commit | None) -> None:
        line = f"dlora: rank {self._ranks.rank}: weights could not be read on all ranks"
        if commit is not None:
            line = commit(ending=True)
        silent = self.lost()  # and meanwhile the others commit as well
        if silent and silent not in reason:
            reason = f"{reason}; {silent}"
        print(f"{line} (lost a peer: {reason})", file=sys.stderr, flush=True)
        os._exit(1)

    # -- beats in the store ---------------------------------------------------------------------

    @staticmethod
    def _between(limit: float) -> float:
        return min(MOST_BETWEEN_BEATS, limit / 30)

    @staticmethod
    def _key(rank: int) -> str:
        return f"beat/{rank}"

    def _put(self, beat: str, store: dist.Store) -> None:
        store.set(self._key(self._ranks.rank), beat)

    def _see_beats(self) -> None:
        def read(store: dist.Store) -> list[bytes]:
            keys = [self._key(rank) for rank in self._others]
            if store.check(keys):
                return store.multi_get(keys)
            return [store.get(key) if store.check([key]) else b"0 0" for key in keys]

        now = time.monotonic()
        for rank, beat in zip(self._others, self._ask(read) or (), strict=False):
            text = beat.decode()
            if self._seen.get(rank, ("", 0.0))[0] != text:
                self._seen[rank] = text, now

    def _beats(self) -> list[str]:
        return [self._seen.get(rank, ("", 0.0))[0] for rank in range(self._ranks.world)]

    def _hindmost(self) -> str:
        """The ranks with the fewest passes: those that the others wait for."""
        passes = {
            rank: int(beat.split()[1]) for rank, (beat, _) in self._seen.items() if beat != LEFT
        }
        passes[self._ranks.rank] = self._passes
        fewest, most = min(passes.values()), max(passes.values())
        if fewest == most:
            return "all ranks are at the same pass"
        behind = [rank for rank, made in passes.items() if made == fewest]
        return f"{self._named(behind)} is behind the others"

    def _ask(self, question: Callable[[dist.Store], T]) -> T | None:
        """The store's answer; None where it has none, and while an earlier question waits."""
        if self._store is None or (self._asking is not None and self._asking.is_alive()):
            return None
        store = self._store
        answers, self._asking = failure.ask(lambda: question(store))
        if not answers:
            return None
        self._answered = time.monotonic()
        return answers[0]

    def _without_store(self) -> str:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            where = os.environ.get("MASTER_ADDR", "another host")
            return f"the agent on {where}, which serves the store, does not answer"
        return f"{self._named([0])}, which serves the store, does not answer"

    def _named(self, ranks: list[int]) -> str:
        hosts = self._ask(lambda store: [self._ranks.host(rank) for rank in ranks])
        named = [f" on {host}" for host in hosts] if hosts else [""] * len(ranks)
        return ", ".join(f"rank {rank}{where}" for rank, where in zip(ranks, named, strict=True))
