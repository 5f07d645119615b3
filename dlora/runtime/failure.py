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
import threading
import time
import traceback
from collections.abc import Iterator

import torch.distributed as dist

from dlora.errors import TransientError, UsageError
from dlora.runtime.exit_status import PrintedError, PrintedTransientError, as_printed, print_error
from dlora.runtime.ranks import Ranks

ANSWER_SECONDS = 5.0  # in which a store answers, if its host is alive
_KEY = "failure"


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
    except RuntimeError as error:
        if (found := found_report(ranks)) is None:
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
    if ranks.device.type == "cpu":  # closing NCCL's groups may itself wait for the others
        _close_connections(error)
    ranks.part(_KEY)
    return as_printed(message, passes)


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


def report(store: dist.Store, message: str, passes: bool) -> bool:
    """Leave a failure for all ranks; returns whether this is the one that counts, the first.

    Args:
        passes: whether trying again may help.
    """
    text = json.dumps([message, passes])
    return bool(store.compare_set(_KEY, "", text) == text.encode())


def read(store: dist.Store) -> tuple[str, bool] | None:
    """(message, passes) of the rank that reported a failure, if one has."""
    found: list[bytes] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            if store.check([_KEY]):
                found.append(store.get(_KEY))

    # Where the store's host is gone, its client blocks for a quarter of an hour.
    asking = threading.Thread(target=ask, name="dlora-failure", daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    if not found:
        return None
    message, passes = json.loads(found[0])
    return message, passes


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
