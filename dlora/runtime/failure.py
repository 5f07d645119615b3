"""What one rank tells all others over the store, when it alone cannot go on.

Its process may live on, as Ray's do, so that nothing else tells them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import threading
import time
import traceback

import torch.distributed as dist

ANSWER_SECONDS = 5.0  # in which a store answers, if its host is there
_KEY = "told"


def tell(store: dist.Store, message: str, passes: bool) -> bool:
    """Whether this is what all will hear: the first rank's word counts.

    Args:
        passes: whether trying again may help.
    """
    said = json.dumps([message, passes])
    return bool(store.compare_set(_KEY, "", said) == said.encode())


def line(store: dist.Store) -> tuple[str, bool] | None:
    """(message, passes) of the rank that has told something, if one has."""
    found: list[bytes] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            if store.check([_KEY]):
                found.append(store.get(_KEY))

    # Where its host is gone without a word, the store keeps a caller for a quarter of an hour.
    asking = threading.Thread(target=ask, name="dlora-told", daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    if not found:
        return None
    message, passes = json.loads(found[0])
    return message, passes


def wait(store: dist.Store, key: str, seconds: float) -> None:
    """Wait so long for a key, but for no rank that has told something.

    Raises:
        RuntimeError: one has, or the key has not come.
    """
    until, pause = time.monotonic() + seconds, 0.01
    while not store.check([key]):
        if time.monotonic() > until:
            raise dist.DistStoreError(f"{key} has not come within {seconds:g} s")
        if store.check([_KEY]):
            raise RuntimeError(f"{key} will not come: another rank has failed")
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def abandon(error: Exception) -> None:
    """End the connections of gloo's groups, so that the others' collectives fail at once.

    Args:
        error: what this rank has met; the frames that it came through lose their variables, for the
            connections close with the last of what used them.
    """
    if not dist.is_initialized():
        return
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    gc.collect()
