"""One rank of a Ray Train job: between Ray's ranks and storage and `dlora.train.main`.

    Ray Train ──rank, nodes, address──> environment, as torchrun would set it ──> dlora.train.main
    dlora.train.main ──each save──> ray.train.report: a line of the metrics, and where it lies

dlora itself copies checkpoints to the storage and takes the newest that verifies from there; Ray is
told of each and copies nothing.
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
import torch.distributed as dist
from pyarrow.fs import FileType
from ray.train import Checkpoint, CheckpointUploadMode, get_context, get_preemption_info, report
from ray.train.collective import broadcast_from_rank_zero

from dlora.config import UsageError
from dlora.train import Hooks, main


@dataclass
class Verdict:
    """How a rank ended: an exit status, and of status 2 the line that says why."""

    status: int
    error: str = ""


def work(given: dict[str, str]) -> Verdict:
    """Train, as one rank of Ray's.

    Args:
        given: `config`, the resolved configuration as YAML, and `directory`, where relative paths
            start unless the job has a working directory of its own.

    Raises:
        RuntimeError: the run ended otherwise than well; Ray starts it again.
    """
    try:
        enter(given["directory"])
        join()
        with tempfile.TemporaryDirectory() as place:
            file = Path(place, "config.yaml")
            file.write_text(given["config"], encoding="utf-8")
            reports = Reports()
            hooks = Hooks(should_save=reports.is_preempted, saved=reports.saved)
            status = main(["--config", str(file)], hooks)
    except UsageError as error:
        return Verdict(2, str(error))  # a return, so that Ray does not try again
    if status:
        raise RuntimeError(f"dlora.train ended with {status}; its lines above say why")
    return Verdict(0)


def enter(directory: str) -> None:
    """Make relative paths mean here what they mean where the job was started.

    Raises:
        UsageError: the directory is not on this node.
    """
    if ray.get_runtime_context().runtime_env.get("working_dir"):
        return  # Ray has unpacked it, and this process is in it
    if not Path(directory).is_dir():
        raise UsageError(
            f"{directory} is not on {socket.gethostname()}: submit the job with a working "
            "directory (launchers.ray_submit), or start it where all nodes see the same files"
        )
    os.chdir(directory)


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

    lost: set[str] = field(default_factory=set)  # nodes that are going, whose notice is answered

    def is_preempted(self) -> bool:
        """Whether a node of this job was given notice since the last time."""
        info = get_preemption_info()
        going = set(info.preempted_node_ids) if info is not None else set()
        new = going - self.lost
        self.lost |= going
        return bool(new)

    def saved(self, record: Mapping[str, Any], checkpoint: Path | None) -> None:
        """Tell Ray of a save."""
        figures = {name: value for name, value in record.items() if is_figure(value)}
        held = stored(checkpoint.name) if checkpoint is not None else None
        report(figures, checkpoint=held, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)


def stored(name: str) -> Checkpoint | None:
    """A checkpoint where dlora has copied it; None where the storage refused it."""
    storage = get_context().get_storage()
    path, files = f"{storage.experiment_fs_path}/{name}", storage.storage_filesystem
    [manifest] = files.get_file_info([f"{path}/manifest.json"])
    return Checkpoint(path, files) if manifest.type == FileType.File else None


def is_figure(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)
