"""One rank of a Ray Train job: between Ray's ranks and storage and `dlora.train.main`.

    Ray Train ──rank, nodes, address──> environment, as torchrun would set it ──> dlora.train.main
    dlora.train.main ──each save──> ray.train.report: a line of the metrics, a pointer

dlora itself copies checkpoints to the storage, prunes them once a newer one has arrived, and takes
the newest that verifies from there. Ray's checkpoint of each is a pointer, one file that says where
dlora's lies: the form that Ray recommends for those that it does not copy.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train import Checkpoint, get_context, get_preemption_info, report
from ray.train.collective import broadcast_from_rank_zero

from dlora.config import UsageError
from dlora.hooks import Committed, Hooks, Saved
from dlora.train import main

POINTER = "checkpoint.json"  # what Ray's checkpoint holds: {"uri": of dlora's, "step": of it}


@dataclass
class Verdict:
    """How a rank ended: an exit status, and of status 2 the line that says why."""

    status: int
    error: str = ""


def work(given: dict[str, str]) -> Verdict:
    """Train, as one rank of Ray's; how that ended, which Ray does not try again.

    Args:
        given: `config`, the resolved configuration as YAML, and `directory`, where relative paths
            start unless the job has a working directory of its own.

    Raises:
        RuntimeError: a peer was lost; Ray starts the run again.
    """
    if error := enter(given["directory"]):
        return Verdict(2, error)
    try:
        join()
        with tempfile.TemporaryDirectory() as place:
            file = Path(place, "config.yaml")
            file.write_text(given["config"], encoding="utf-8")
            reports = Reports()
            hooks = Hooks(
                should_save=reports.is_preempted, saved=reports.saved, lost=reports.lose_peer
            )
            status = main(["--config", str(file)], hooks)
            reports.close()
    except UsageError as error:
        return Verdict(2, str(error))
    if reports.has_lost_peer:
        raise RuntimeError("a peer was lost; the lines above say which step is committed")
    return Verdict(status)


def enter(directory: str) -> str:
    """Make relative paths mean here what they mean where the job was started.

    Returns:
        The same on every rank: nothing, or what is wrong if a node does not have the directory.
    """
    # Without a working directory of the job's, which Ray has unpacked and started this process in.
    needed = not ray.get_runtime_context().runtime_env.get("working_dir")
    absent = torch.tensor(float(needed and not Path(directory).is_dir()))
    dist.all_reduce(absent)  # over Ray's group
    if absent.item():
        return (
            f"{directory} is not seen by {absent.item():g} of the workers: submit the job with a "
            "working directory (launchers.ray_submit), or start it where all nodes see the same "
            "files"
        )
    if needed:
        os.chdir(directory)
    return ""


def join() -> None:
    """Set what torchrun would set, from Ray's ranks, and a meeting point on rank 0's node."""
    dist.destroy_process_group()  # Ray's; the run makes its own, over devices of its choice
    context = get_context()
    met = None
    if context.get_world_rank() == 0:
        met = {"MASTER_ADDR": ray.util.get_node_ip_address(), "MASTER_PORT": str(free_port())}
    ranks = {
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "GROUP_RANK": context.get_node_rank(),
    }
    os.environ.update(broadcast_from_rank_zero(met))
    os.environ.update({name: str(value) for name, value in ranks.items()})


def free_port() -> int:
    """One that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class Reports:
    """What Ray is told and asked while the run goes on.

    All of it is a barrier over Ray's ranks, so each rank has to come to the same ones in the same
    order. One thread keeps the order of the run's steps, and the run itself waits only at its end.

    Attributes:
        has_lost_peer: whether the run ended that way.
    """

    def __init__(self) -> None:
        self.has_lost_peer = False
        self._thread = ThreadPoolExecutor(1, "dlora-ray")
        self._waiting: deque[Future[None]] = deque()
        self._answered: set[str] = set()  # nodes that are going
        self._notice = threading.Event()  # one of them, and nobody has saved for it yet

    def is_preempted(self) -> bool:
        """Whether a node of this job was given notice since the last time; asks for the next."""
        self._submit(self._ask)
        has_come = self._notice.is_set()
        self._notice.clear()
        return has_come

    def saved(self, record: Mapping[str, Any], committed: Committed) -> None:
        """Tell Ray of a save: the step's figures, and from rank 0 where its checkpoint lies."""
        figures = {name: value for name, value in record.items() if is_figure(value)}
        self._submit(lambda: self._report(figures, committed()))

    def lose_peer(self) -> None:
        """A peer is gone, and with it all that would wait for it."""
        self.has_lost_peer = True

    def close(self) -> None:
        """Wait until Ray knows all, unless a peer is gone."""
        self._thread.shutdown(wait=not self.has_lost_peer, cancel_futures=self.has_lost_peer)
        if not self.has_lost_peer:
            self._see_done()

    def _submit(self, job: Callable[[], None]) -> None:
        self._see_done()
        self._waiting.append(self._thread.submit(job))

    def _see_done(self) -> None:
        """Raise what was raised meanwhile."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()

    def _ask(self) -> None:
        info = get_preemption_info()
        going = set(info.preempted_node_ids) if info is not None else set()
        if going - self._answered:
            self._notice.set()
        self._answered |= going

    def _report(self, figures: Mapping[str, Any], checkpoint: Saved | None) -> None:
        if checkpoint is None or checkpoint.url is None:
            report(dict(figures))
            return
        with tempfile.TemporaryDirectory() as place:
            pointer = {"uri": checkpoint.url, "step": figures["step"]}
            Path(place, POINTER).write_text(json.dumps(pointer) + "\n", encoding="utf-8")
            report(dict(figures), checkpoint=Checkpoint.from_directory(place))


def is_figure(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)
