"""A rank that cannot go on reports it, and whatever waits or watches ends in its time."""

import pytest
import torch.distributed as dist

from dlora.runtime import failure


def test_a_key_is_waited_for_so_long_and_no_longer() -> None:
    """The store's own timeout does not come on top of it."""
    store, limit = dist.HashStore(), 0.1
    with pytest.raises(dist.DistStoreError, match=r"ready/1 is not in the store after 0\.1 s"):
        failure.wait(store, "ready/1", limit)
    store.set("ready/1", "")
    failure.wait(store, "ready/1", limit)


def test_a_report_ends_the_wait_for_a_key() -> None:
    store = dist.HashStore()
    assert failure.report(store, "the disk is full", True)
    assert not failure.report(store, "it still is", False)  # the first report counts
    with pytest.raises(RuntimeError, match="another rank has failed"):
        failure.wait(store, "ready/1", 600)
    assert failure.read(store) == ("the disk is full", True)
