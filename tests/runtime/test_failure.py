"""What waits for a key ends in its time, or when another rank fails."""

import pytest
import torch.distributed as dist

from dlora.runtime import failure as told


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
