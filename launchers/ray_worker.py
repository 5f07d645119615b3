"""One rank of a Ray Train job: between Ray's ranks and storage and `dlora.train.main`.

    Ray Train ──rank, nodes──> environment, as torchrun would set it ──> dlora.train.main
    dlora.train.main ──each save──> ray.train.report: a line of the metrics, a pointer

dlora itself copies checkpoints to the storage, prunes them once a newer one has arrived, and takes
the newest that verifies from there. Ray's checkpoint of each is a pointer, one file with the place
of dlora's: the form that Ray recommends for those that it does not copy.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import (
    Checkpoint,
    CheckpointUploadMode,
    get_context,
    get_preemption_info,
    report,
)
from ray.train.backend import Backend
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig

from dlora.config.load import UsageError
from dlora.hooks import Committed, Hooks, Saved
from dlora.train import main

from . import NAME
from .ray_board import Teller

PACE_SECONDS = 5.0  # that a save waits for the report of the previous one
GOING_SECONDS = 60.0  # in which Ray notices that a node is gone
POLLED_SECONDS = 5.0  # in which Ray Train looks at its workers again
MOST_WAITING = 32  # questions and reports that the run may be ahead of Ray
POINTER = "checkpoint.json"  # the content of Ray's checkpoint: {"uri": of dlora's, "step": of it}


class Ungrouped(TorchConfig):
    """Ray's set-up for torch, without a process group.

    The run makes its own, with a timeout, and names the hosts that do not join; Ray would wait for
    half an hour, and not restart.
    """

    @property
    def backend_cls(self) -> type[Backend]:
        return _Ungrouped


class _Ungrouped(Backend):
    share_cuda_visible_devices = True  # LOCAL_RANK counts the GPUs of a node's workers


@dataclass
class Verdict:
    """How a rank ended: its exit status, and for status 2 the error line."""

    status: int
    error: str = ""


def work(given: dict[str, Any]) -> Verdict:
    """Train as one rank of a Ray job; returns how it ended, after which Ray does not restart.

    Args:
        given: `config`, the resolved configuration as YAML, and `directory`, where relative paths
            start unless the job has a working directory of its own; `run`, a name that all starts
            of this run have and no other; `stop`, a flag to ask (see `ray_stop`) or None; `trials`,
            of a sweep that this run trains together, the arguments of a `Teller`, or None.

    Raises:
        RuntimeError: a peer was lost; Ray starts the run again.
    """
    os.environ["DLORA_RUN_ID"] = given["run"]
    try:
        join()
        with tempfile.TemporaryDirectory() as place:
            file = Path(place, "config.yaml")
            file.write_text(given["config"], encoding="utf-8")
            reports = Reports(given["stop"] if os.environ["RANK"] == "0" else None)
            hooks = Hooks(
                enter=lambda: enter(given["directory"]),
                should_stop=reports.is_stopped,
                should_save=reports.is_preempted,
                saved=reports.saved,
                lost=reports.lose_peer,
            )
            if given["trials"] is not None and os.environ["RANK"] == "0":
                hooks = Teller(**given["trials"]).beside(hooks)
            status = main(["--config", str(file)], hooks)
            reports.close()
    except UsageError as error:
        return Verdict(2, str(error))
    if reports.has_lost_peer:
        reports.wait_for_going()
        raise RuntimeError("a peer was lost; the lines above say which step is committed")
    return Verdict(status)


def enter(directory: str) -> None:
    """Change to the directory in which the job was started, for relative paths.

    Raises:
        UsageError: this node does not have the directory.
    """
    if ray.get_runtime_context().runtime_env.get("working_dir"):
        return  # the job's own, which Ray has unpacked and started this process in
    try:
        os.chdir(directory)
    except OSError as error:
        raise UsageError(
            f"{directory} does not exist on {socket.gethostname()} ({error.strerror}): submit the "
            f"job with a working directory ({NAME}.ray_submit), or start it where all nodes see "
            "the same files"
        ) from None


def join() -> None:
    """Set torchrun's environment from Ray's ranks, with a rendezvous on rank 0's node."""
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
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class Reports:
    """Reports to Ray, and questions to it, while the run continues.

    All but the stop are barriers over Ray's ranks, so each rank has to enter the same ones in the
    same order. One thread keeps the order of the run's steps. The run itself waits for it at
    its end, and where it is `MOST_WAITING` of them ahead: of steps that are faster than Ray, or
    while a checkpoint goes to its storage.

    Args:
        stop: the flag of `ray_stop`, on the one rank that asks it.

    Attributes:
        has_lost_peer: whether the run ended that way.
    """

    def __init__(self, stop: Any = None) -> None:
        self._stop, self._asking = stop, None
        self._told: Future[None] | None = None  # the newest report
        self.has_lost_peer = False
        self._thread = ThreadPoolExecutor(1, "dlora-ray")
        self._waiting: deque[Future[None]] = deque()
        self._answered: set[str] = set()  # nodes that are going
        self._notice = threading.Event()  # a node is going, and no save has answered it yet

    def is_stopped(self) -> bool:
        """Whether the run was stopped; the flag answers only then."""
        if self._stop is None:
            return False
        if self._asking is None:
            self._asking = self._stop.get.remote()
        return bool(ray.wait([self._asking], timeout=0)[0]) and bool(ray.get(self._asking))

    def is_preempted(self) -> bool:
        """Whether a node of this job was given notice since the last time; asks for the next."""
        self._submit(self._ask)
        has_come = self._notice.is_set()
        self._notice.clear()
        return has_come

    def saved(self, record: Mapping[str, Any], committed: Committed) -> None:
        """Report a save to Ray: the step's figures and, from rank 0, the checkpoint's URL.

        Ray takes one report in a second or two; where saves come faster, each waits a while for the
        one before, so that no notice waits behind many.
        """
        figures = {name: value for name, value in record.items() if is_figure(value)}
        if self._told is not None:
            wait([self._told], PACE_SECONDS)
        self._told = self._submit(lambda: self._report(figures, committed()))

    def lose_peer(self) -> None:
        """Note that a peer is gone, so that nothing waits for it."""
        self.has_lost_peer = True

    def wait_for_going(self) -> None:
        """Wait until Ray Train has seen the end of the nodes that were given notice, if any.

        Otherwise the errors of ranks that lost them would count as failures of these ranks.
        """
        if not self._answered:
            return
        until = time.monotonic() + GOING_SECONDS
        while time.monotonic() < until and self._answered & living():
            time.sleep(1)
        time.sleep(POLLED_SECONDS)

    def close(self) -> None:
        """Wait until all reports have arrived, unless a peer is gone."""
        self._thread.shutdown(wait=not self.has_lost_peer, cancel_futures=self.has_lost_peer)
        if not self.has_lost_peer:
            self._see_done()

    def _submit(self, job: Callable[[], None]) -> Future[None]:
        if len(self._waiting) >= MOST_WAITING:  # steps are faster than Ray's barriers
            wait([self._waiting[0]])
        self._see_done()
        self._waiting.append(submitted := self._thread.submit(job))
        return submitted

    def _see_done(self) -> None:
        """Raise what a finished report or question raised."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()

    def _ask(self) -> None:
        info = get_preemption_info()
        going = set(info.preempted_node_ids) if info is not None else set()
        if going - self._answered:
            self._notice.set()
        self._answered |= going

    def _report(self, figures: Mapping[str, Any], checkpoint: Saved | None) -> None:
        url = checkpoint.url if checkpoint is not None else None
        pointer = None if url is None else point_to(url, int(figures["step"]))
        upload = CheckpointUploadMode.NO_UPLOAD
        report(dict(figures), checkpoint=pointer, checkpoint_upload_mode=upload)


def living() -> set[str]:
    """Ids of the nodes that Ray considers alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def point_to(url: str, step: int) -> Checkpoint | None:
    """Store a pointer to a checkpoint in Ray's storage; None if that fails.

    A failure in `report` itself would end all ranks.
    """
    name = f"checkpoint_{step:06d}_{uuid.uuid4().hex[:8]}"  # a step may be saved twice
    try:
        with tempfile.TemporaryDirectory() as place:
            content = json.dumps({"uri": url, "step": step})
            Path(place, POINTER).write_text(content + "\n", encoding="utf-8")
            local = Checkpoint.from_directory(place)
            return get_context().get_storage().persist_current_checkpoint(local, name)
    except Exception as error:  # every store has exceptions of its own
        reason = " ".join(str(error).split())
        print(
            f"dlora: warning: step {step} could not be reported to Ray: {reason}", file=sys.stderr
        )
        return None


def is_figure(value: Any) -> bool:
    """Whether Ray takes a value as a metric."""
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)
