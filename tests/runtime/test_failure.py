"""What waits or watches beside a run ends in its time."""

import threading
import time

import pytest
import torch.distributed as dist

from dlora.runtime import failure as told
from dlora.runtime.memory import MemoryMeter


def test_a_key_that_does_not_come_is_waited_for_once() -> None:
    """The store's own time would come on top of it."""
    store, limit = dist.HashStore(), 0.1
    with pytest.raises(dist.DistStoreError, match=r"ready/1 has not come within 0\.1 s"):
        told.wait(store, "ready/1", limit)
    store.set("ready/1", "")
    told.wait(store, "ready/1", limit)


def test_who_waits_for_a_key_hears_what_another_rank_tells() -> None:
    store = dist.HashStore()
    assert told.tell(store, "the disk is full", True)
    assert not told.tell(store, "it still is", False)  # the first one's word counts
    with pytest.raises(RuntimeError, match="another rank has failed"):
        told.wait(store, "ready/1", 600)
    assert told.line(store) == ("the disk is full", True)


def watching() -> int:
    return sum(thread.name == "dlora-memory" for thread in threading.enumerate())


def test_a_meter_watches_as_long_as_somebody_has_it() -> None:
    """Not as long as the process, in which run may follow run."""
    before, meter = watching(), MemoryMeter()
    assert watching() == before + 1
    held = bytearray(1) * (50 << 20)
    assert meter.peak() >= len(held)
    del meter
    deadline = time.monotonic() + 30
    while watching() > before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
