"""`python -m launchers.ray_train --config FILE --num-workers N`: dlora.train under Ray Train.

    python -m launchers.ray_train --config configs/lora.yaml --num-workers 4 --use-gpu \\
        --storage s3://bucket/runs

Ray places the workers, starts them again when one is lost, and changes their number between MIN and
MAX; the global batch, the order of the data and the result stay what they are. Rank 0 fetches the
newest checkpoint that verifies from the storage, or from `output.remote` where that is set,
on whatever node it is. The same command, with the same storage and name, resumes from there.

Exit status: 0 done, 2 a wrong configuration (one line, no restarts), 143 and 130 after a stop by
SIGTERM or Ctrl-C, which commits first, 1 anything else.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dlora.config.load import Config, UsageError, dump_yaml, option, parse
from dlora.train import exit_with

from . import NAME

# Variables of the environment that every worker gets; Ray shows them, so no secrets.
FORWARDED = (
    *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "NCCL_IB_HCA", "OMP_NUM_THREADS"),
    *("DS_ACCELERATOR", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "HF_HOME", "HF_HUB_OFFLINE"),
)


@dataclass(frozen=True)
class Workers:
    """How Ray runs the job."""

    num_workers: str = option(
        "1",
        "ranks; with MIN:MAX the run continues on those it has, and Ray adds more when nodes join",
    )
    use_gpu: bool = option(False, "one GPU for each worker; without it, none")
    resources: dict[str, float] = option(
        {}, 'resources of each worker, as {"CPU": 4}; empty: Ray\'s own', gt=0
    )
    storage: str | None = option(
        None,
        "a path or URL that all nodes see, for Ray's own files and, without output.remote, for "
        "checkpoints and the adapter; null: output.dir",
    )
    name: str | None = option(None, "name of the run in the storage; null: that of output.dir")
    max_failures: int = option(
        3,
        "restarts after a lost worker, -1: any number; announced removals of nodes do not count",
        ge=-1,
    )


@dataclass(frozen=True)
class Place:
    """The place of Ray's files of a run, and without `output.remote` of checkpoints and adapter:
    `name` in `storage`, a directory or URL.
    """

    storage: str
    name: str

    @property
    def url(self) -> str:
        """The URL of both, as `output.remote` takes it."""
        storage = self.storage.rstrip("/")
        return f"{storage if '://' in storage else f'file://{storage}'}/{self.name}"


def main(argv: list[str]) -> int:
    """Run the job; returns the exit status."""
    options = parse(argv, prog=f"{NAME}.ray_train", extra=Workers)
    if options.check:
        raise UsageError("--check is an option of dlora.train, which reads the same configuration")
    workers = options.extra
    if options.config.adapters:
        raise UsageError(
            "adapters: Ray copies the checkpoints of one adapter to its storage; train several "
            "with torchrun, dlora launch or Slurm"
        )
    config, place = placed(options.config, workers)
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # it would drop lines of steps as duplicates
    from ray.train.v2.api.exceptions import TrainingFailedError

    from . import ray_stop, ray_worker  # noqa: F401

    # The directory is read before a submitted job joins Ray, which may unpack its files anew.
    directory = Path.cwd()
    stop = ray_stop.Stop()
    try:
        forgetting = [ray_stop.Forgetting(stop.flag)]
        made = trainer(config, workers, place, directory, stop=stop.flag, callbacks=forgetting)
        verdict = stop.wait_for(made.fit).return_value
    except TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1]
        print(f"dlora: error: Ray gave up the run: {reason}", file=sys.stderr, flush=True)
        return 1
    if verdict.status == 2:
        raise UsageError(verdict.error)
    return stop.status(verdict.status)


def placed(config: Config, workers: Workers) -> tuple[Config, Place]:
    """The configuration with an `output.remote`, and Ray's place.

    A run of several adapters has none: its checkpoints stay in `output.dir`.

    Raises:
        UsageError: as for `place_of`; or two options contradict each other.
    """
    check_options(config, workers)
    place = place_of(config, workers, submitted=is_submitted())
    if config.output.remote is None and not config.adapters:
        config = replace(config, output=replace(config.output, remote=place.url))
    return config, place


def check_options(config: Config, workers: Workers) -> None:
    """Check that the options fit together, and that Ray is installed.

    Raises:
        UsageError: they do not, or it is not.
    """
    number(workers.num_workers)
    if config.output.resume != "auto":
        raise UsageError(
            "output.resume: must be auto, since Ray restarts lost ranks; to start afresh name "
            "another output.dir and --name (or output.remote), to start from an adapter set "
            "adapter.path"
        )
    if "GPU" in workers.resources and not workers.use_gpu:
        raise UsageError("--resources: GPU needs --use-gpu")
    if config.adapters and workers.storage is not None:
        raise UsageError(
            "--storage: checkpoints of several adapters stay in output.dir, which all nodes have "
            "to see; remove it"
        )
    if find_spec("ray") is None:
        raise UsageError("Ray is not installed: pip install 'dlora[ray]'")


def place_of(config: Config, workers: Workers, *, submitted: bool) -> Place:
    """The place of the run in Ray's storage.

    Args:
        submitted: as a job, whose relative paths start in a working directory of its own.

    Raises:
        UsageError: it would be deleted with the job's working directory.
    """
    directory = Path(config.output.dir).expanduser()
    if workers.storage is None:
        key, path, name = "output.dir", directory, workers.name or "ray"
    else:
        name = workers.name or directory.name
        if "://" in workers.storage:
            return Place(workers.storage, name)
        key, path = "--storage", Path(workers.storage).expanduser()
    if submitted and not path.is_absolute():
        raise UsageError(
            f"{key}: {path} is in the job's working directory, which is deleted with the job; name "
            "an absolute path that all nodes see, or a URL as --storage"
        )
    return Place(str(path.absolute()), name)


def is_submitted() -> bool:
    """Whether this is the entry point of a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def trainer(
    config: Config,
    workers: Workers,
    place: Place,
    directory: Path,
    *,
    stop: Any = None,
    trials: Mapping[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
) -> Any:
    """Build Ray's trainer of the run.

    Args:
        directory: where relative paths start.
        stop: a handle of `ray_stop.Flag`; None: signals do not stop the run.
        trials: of a sweep, where the run trains several: the arguments of `ray_board.Teller`.
        callbacks: Ray Train's, called with reports and when ranks are lost.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from .ray_worker import Ungrouped, work

    forwarded = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    forwarded["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"  # it prints every line twice
    forwarded["RAY_worker_niceness"] = "0"  # Ray's workers have a low priority; a rank must not
    if not workers.use_gpu:  # Ray does not hide GPUs from workers without one
        forwarded["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths start where the job does
    return TorchTrainer(
        work,
        train_loop_config={
            "config": dump_yaml(config),
            "directory": str(directory),
            "run": uuid.uuid4().hex,
            "stop": stop,
            "trials": trials,
        },
        torch_config=Ungrouped(),
        scaling_config=ScalingConfig(
            num_workers=number(workers.num_workers),
            use_gpu=workers.use_gpu,
            resources_per_worker=workers.resources or None,
        ),
        run_config=RunConfig(
            name=place.name,
            storage_path=place.storage,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.output.keep_last),
            worker_runtime_env={"env_vars": forwarded},
            callbacks=list(callbacks),
        ),
    )


def number(text: str) -> int | tuple[int, int]:
    """Parse `--num-workers`: N, or (MIN, MAX).

    Raises:
        UsageError: it is neither.
    """
    parts = text.split(":")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"--num-workers: expected N or MIN:MAX, got {text!r}")
    least, most = int(parts[0]), int(parts[-1])
    if least > most:
        raise UsageError(f"--num-workers: {least} is more than {most}")
    return (least, most) if len(parts) == 2 else least


if __name__ == "__main__":
    exit_with(main)
