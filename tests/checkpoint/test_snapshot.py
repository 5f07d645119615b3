"""Snapshots where a GPU's copies arrive late, never, or break: stub events, and CPU tensors."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from dlora.checkpoint.device_copy import copy_in_pieces, pieces
from dlora.checkpoint.snapshot import Snapshots
from dlora.sharding.replica.replica import Replica
from dlora.sharding.topology import Topology


class Event:
    """Stands for a copy's event. `answers`: what each question gets; there may be no more."""

    def __init__(self, *answers: bool | Exception) -> None:
        self.answers = list(answers)
        self.is_there = threading.Event()

    def query(self) -> bool:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def synchronize(self) -> None:
        self.is_there.wait(60)


FAULT = RuntimeError("CUDA error: uncorrectable ECC error encountered")


@pytest.fixture
def replica() -> Replica:
    replica = Replica(Topology(0, 1, 1))
    replica.own({"a": torch.nn.Parameter(torch.zeros(3)), "b": torch.nn.Parameter(torch.ones(2))})
    return replica


def take(snapshots: Snapshots, replica: Replica, step: int, event: Any = None) -> None:
    """After `step` steps every value is `step`; `event` stands for its arrival."""
    with torch.no_grad():
        replica.values.fill_(step)
    snapshots.take(step, {"step": step}, replica, states={}, record=None, frozen={}, state={})
    snapshots._newest_first[0].arriving = event


def newest(snapshots: Snapshots) -> int | None:
    """The step that would be committed, after a look at what would be."""
    with snapshots.newest() as found:
        if found is None:
            return None
        assert found.metrics == {"step": found.step}
        for tensor in found.files["adapter"].values():
            assert tensor.eq(found.step).all()
        return found.step


def test_after_a_fault_the_older_one_is_committed(replica: Replica) -> None:
    snapshots = Snapshots()
    assert newest(snapshots) is None
    take(snapshots, replica, 1)
    take(snapshots, replica, 2, Event(FAULT, FAULT))
    assert newest(snapshots) == 1


def test_what_has_arrived_is_not_asked_again(replica: Replica) -> None:
    """As the passes of the next step do; then the GPU fails."""
    snapshots = Snapshots()
    take(snapshots, replica, 1)
    take(snapshots, replica, 2, Event(False, True, FAULT))
    snapshots.look()
    snapshots.look()
    assert newest(snapshots) == 2


def test_nobody_waits_for_a_copy_that_does_not_arrive(replica: Replica) -> None:
    """The training thread is stuck in it, as behind a collective whose peer is gone."""
    snapshots, late = Snapshots(), Event(*[False] * 4)
    take(snapshots, replica, 1)
    take(snapshots, replica, 2, late)
    stuck = threading.Thread(target=take, args=(snapshots, replica, 3))
    stuck.start()
    try:
        assert newest(snapshots) == 1
    finally:
        late.is_there.set()
        stuck.join()
    assert newest(snapshots) == 3


def test_what_is_being_committed_stays_as_it_is(replica: Replica) -> None:
    snapshots = Snapshots()
    take(snapshots, replica, 1)
    with snapshots.newest() as found:
        assert found is not None
        take(snapshots, replica, 2)
        third = threading.Thread(target=take, args=(snapshots, replica, 3))
        third.start()
        third.join(0.2)
        assert third.is_alive() and found.files["adapter"]["a"].eq(1).all()
    third.join()
    assert newest(snapshots) == 3


@pytest.mark.parametrize("size", [1, 4, 7, 64])
def test_pieces_of_a_staging_buffer_arrive_as_a_whole(size: int) -> None:
    tensors = [torch.arange(12.0).view(3, 4), torch.zeros(0), torch.tensor(5.0), torch.rand(9)]
    host = torch.empty(22)
    copy_in_pieces(tensors, host, torch.empty(size))
    assert host.equal(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    found = [sum(part.numel() for part in piece) for piece in pieces(tensors, size)]
    assert found[:-1] == [size] * (len(found) - 1) and 0 < found[-1] <= size
