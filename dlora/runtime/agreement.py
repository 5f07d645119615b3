"""What ranks exchange through the store, before there is a process group and beside it.

agree      the same work on every rank; all continue, or all raise the first rank's error
gather     the values of all ranks on every rank
broadcast  rank 0's value on every rank
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dlora.errors import TransientError, UsageError
from dlora.runtime import failure
from dlora.runtime.exit_status import as_printed, print_error
from dlora.runtime.ranks import Ranks


def agree(
    ranks: Ranks, topic: str, work: Callable[[], tuple[Any, str]], patience_seconds: float = 0.0
) -> Any:
    """Do the same work on every rank, and continue only if all of them succeeded alike.

    Args:
        topic: name of the exchange.
        work: returns (result, fingerprint); a `UsageError` in it is the user's mistake.
        patience_seconds: that the others wait for rank 0 beyond the timeout.

    Raises:
        UsageError: on every rank, with the first failing rank's message; or if fingerprints
            differ, as when two nodes have different data files. With several ranks, rank 0 has
            printed it before any of them could leave: an agent ends all ranks as soon as one of
            them has ended.
        TransientError: likewise, if that is the first failing rank's error.
    """
    result, fingerprint, trouble = None, "", None
    try:
        result, fingerprint = work()
    except (UsageError, TransientError) as error:
        if ranks.store is None:
            raise
        trouble = [str(error), isinstance(error, TransientError)]
    if ranks.store is None:
        return result
    ranks.store.set(f"{topic}/{ranks.rank}", json.dumps([trouble, fingerprint]))
    verdict = _verdict(ranks, topic) if ranks.main else None
    verdict = broadcast(ranks, f"{topic}/verdict", verdict, patience_seconds)
    if verdict is not None:
        ranks.part(topic)
        raise as_printed(*verdict)
    return result


def gather(ranks: Ranks, topic: str, value: Any) -> list[Any]:
    """The values of all ranks, JSON-like and in their order, on every rank."""
    if ranks.store is None:
        return [value]
    ranks.store.set(f"{topic}/{ranks.rank}", json.dumps(value))
    others = range(ranks.world if ranks.main else 0)
    return broadcast(ranks, topic, [_get(ranks, f"{topic}/{rank}") for rank in others])


def broadcast(ranks: Ranks, topic: str, value: Any, patience_seconds: float = 0.0) -> Any:
    """Rank 0's value, JSON-like, on every rank.

    Args:
        patience_seconds: that the others wait for it beyond the timeout.
    """
    if ranks.store is None:
        return value
    if ranks.main:
        ranks.store.set(topic, json.dumps(value))
    if patience_seconds:
        with contextlib.suppress(dist.DistStoreError):
            ranks.store.wait([topic], timedelta(seconds=patience_seconds))
    return _get(ranks, topic)


def _verdict(ranks: Ranks, topic: str) -> tuple[str, bool] | None:
    """(message, whether it may pass) of the first rank that failed, printed; None: none did."""
    reports = [_get(ranks, f"{topic}/{rank}") for rank in range(ranks.world)]
    for rank, (trouble, fingerprint) in enumerate(reports):
        if trouble is None and fingerprint == reports[0][1]:
            continue
        if trouble is None:
            message, passes = f"{topic}: rank {rank} differs from rank 0; compare its files", False
        else:
            message, passes = trouble
            message = f"rank {rank}: {message}" if rank else message
        print_error(message)
        return message, passes
    return None


def _get(ranks: Ranks, key: str) -> Any:
    """What a rank has left in the store, or will leave there."""
    assert ranks.store is not None
    failure.wait(ranks.store, key, ranks.timeout_seconds)
    return json.loads(ranks.store.get(key))
