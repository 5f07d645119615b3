"""How a rank that cannot continue ends the others, whose collectives wait for it.

    failing rank   leaves its message in the store, then closes gloo's connections
    other ranks    their collective fails, they find the message and raise it

A process that ends closes its connections by itself; one that lives on, as Ray's workers do, must
close them. In torch 2.13 `abort()` and `shutdown()` of a gloo backend do nothing: on 2 ranks a peer
stayed in its all-reduce until the other process ended, also when each aborted its own side. The
connections close with the last reference to the group, so `_close_connections` drops those that the
error's traceback holds.
"""

from __future__ import annotations

import contextlib
import gc
import json
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch.distributed as dist

from dlora.errors import TransientError, UsageError
from dlora.runtime.exit_status import PrintedError, PrintedTransientError, as_printed, print_error
from dlora.runtime.ranks import Ranks

T = TypeVar("T")
ANSWER_SECONDS = 5.0  # in which a store answers, if its host is alive
_KEY, CRASH = "failure", "crash"


@contextlib.contextmanager
def reported(ranks: Ranks) -> Iterator[None]:
    """Inside, an error of one rank ends all ranks.

    The block calls a function that makes what uses process groups: only then is nothing of it left
    when the error arrives here.

    Raises:
        UsageError, TransientError: on every rank, printed once by the first rank that has one.
    """
    try:
        yield
    except (UsageError, TransientError) as error:
        raise _report(ranks, error) from error
    except Exception as error:
        if not isinstance(error, RuntimeError) or (found := found_report(ranks)) is None:
            _report_crash(ranks, error)
            raise
        raise _leave(ranks, error, *found) from error


def found_report(ranks: Ranks) -> tuple[str, bool] | None:
    """(message, whether it may pass) of the rank that reported a failure, if one has."""
    return None if ranks.store is None else read(ranks.store)


def _report(ranks: Ranks, error: UsageError | TransientError) -> UsageError | TransientError:
    if ranks.store is None or isinstance(error, (PrintedError, PrintedTransientError)):
        return error
    message, passes = str(error), isinstance(error, TransientError)
    if not ranks.main and not message.startswith("rank "):
        message = f"rank {ranks.rank}: {message}"
    if report(ranks.store, message, passes):
        print_error(message)
    return _leave(ranks, error, message, passes)


def _leave(
    ranks: Ranks, error: Exception, message: str, passes: bool
) -> UsageError | TransientError:
    """The failure as an error, once no rank waits for this one any more."""
    _part(ranks, error, _KEY)
    return as_printed(message, passes)


def _part(ranks: Ranks, error: Exception, topic: str) -> None:
    """End what others have with this rank, and give them the time to read why."""
    if ranks.device.type == "cpu":
        _close_connections(error)
    elif dist.is_initialized():
        # Closing NCCL's groups may itself wait for the others, and their kernels wait for this one.
        with contextlib.suppress(RuntimeError):
            dist.distributed_c10d._abort_process_group()
    ranks.part(topic)


def _close_connections(error: Exception) -> None:
    if not dist.is_initialized():
        return
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    gc.collect()


def _report_crash(ranks: Ranks, error: Exception) -> None:
    """Leave for all ranks that this one ends with a traceback; it is theirs to end as well."""
    if ranks.store is None:
        return
    store, first = ranks.store, str(error).strip().split("\n")[0]
    text = f"rank {ranks.rank} on {socket.gethostname()} failed: {type(error).__name__}: {first}"
    answers, _ = ask(lambda: store.compare_set(CRASH, "", text))
    if answers:
        _part(ranks, error, CRASH)


def crash(store: dist.Store) -> str:
    """What a rank that ends with a traceback has left; nothing if no rank has crashed."""
    return store.get(CRASH).decode() if store.check([CRASH]) else ""


def report(store: dist.Store, message: str, passes: bool) -> bool:
    """Leave a failure for all ranks; returns whether this is the one that counts, the first.

    Args:
        passes: whether trying again may help.
    """
    text = json.dumps([message, passes])
    return bool(store.compare_set(_KEY, "", text) == text.encode())


def read(store: dist.Store) -> tuple[str, bool] | None:
    """(message, passes) of the rank that reported a failure, if one has."""
    answers, _ = ask(lambda: read_now(store))
    return answers[0] if answers else None


def read_now(store: dist.Store) -> tuple[str, bool] | None:
    """`read`, of a store whose host is alive."""
    if not store.check([_KEY]):
        return None
    message, passes = json.loads(store.get(_KEY))
    return message, passes


def note(ranks: Ranks, key: str, text: str) -> None:
    """Leave something for the other ranks, if the store answers."""
    if (store := ranks.store) is not None:
        ask(lambda: store.set(key, text))


def noted(ranks: Ranks, key: str, seconds: float) -> str:
    """What a rank has noted, after at most so many seconds; nothing where there is none by then."""
    if (store := ranks.store) is None:
        return ""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        answers, _ = ask(lambda: store.get(key).decode() if store.check([key]) else "")
        if not answers or answers[0]:
            return "".join(answers)
        time.sleep(0.1)
    return ""


def ask(question: Callable[[], T]) -> tuple[list[T], threading.Thread]:
    """([what a question to the store returns], the thread that asks it).

    Where the store's host is gone, its client blocks for a quarter of an hour: then there is no
    answer after some seconds, and the thread still lives.
    """
    answers = list[T]()

    def work() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(question())

    asking = threading.Thread(target=work, name="dlora-store", daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    return answers, asking


def wait(store: dist.Store, key: str, seconds: float) -> None:
    """Wait for a key, unless a rank reports a failure meanwhile.

    Raises:
        RuntimeError: one has, or the key is not there after `seconds`.
    """
    until, pause = time.monotonic() + seconds, 0.01
    while not store.check([key]):
        if time.monotonic() > until:
            raise dist.DistStoreError(f"{key} is not in the store after {seconds:g} s")
        if store.check([_KEY]):
            raise RuntimeError(f"{key} will not be set: another rank has failed")
        time.sleep(pause)
        pause = min(2 * pause, 0.25)
