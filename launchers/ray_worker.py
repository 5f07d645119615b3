"""One rank of a Ray Train job: between Ray's ranks and storage and `dlora.train.main`.

    Ray Train ──rank, nodes, address──> environment, as torchrun would set it ──> dlora.train.main
    dlora.train.main ──each save──> ray.train.report: a line of the metrics, the checkpoint's name

dlora itself copies checkpoints to the storage, prunes them, and takes the newest that verifies from
there. Ray is told of each as a figure: it would refuse to go on once one that it knows is pruned.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train import get_context, get_preemption_info, report
from ray.train.collective import broadcast_from_rank_zero

from dlora.config import UsageError
from dlora.train import Hooks, main


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


@dataclass
class Reports:
    """What Ray is told and asked; every rank does so equally often, for each is a barrier."""

    answered: set[str] = field(default_factory=set)  # nodes that are going, and were saved for
    has_lost_peer: bool = False

    def is_preempted(self) -> bool:
        """Whether a node of this job was given notice since the last time."""
        info = get_preemption_info()
        going = set(info.preempted_node_ids) if info is not None else set()
        new = going - self.answered
        self.answered |= going
        return bool(new)

    def lose_peer(self) -> None:
        """A peer is gone."""
        self.has_lost_peer = True

    def saved(self, record: Mapping[str, Any], checkpoint: Path | None) -> None:
        """Tell Ray of a save."""
        figures = {name: value for name, value in record.items() if is_figure(value)}
        report(figures | ({"checkpoint": checkpoint.name} if checkpoint else {}))


def is_figure(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)
