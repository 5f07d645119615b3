"""`dlora launch [torchrun's options] --config FILE …`: dlora.train under torch's elastic agent.

Like `torchrun -m dlora.train`, with one difference: the exit status is that of the first worker
that failed (2 for a wrong configuration, 143 and 130 for a stop by signal), where torchrun says 1
for all. After a failure it waits until the other nodes' agents have seen theirs: over c10d one
agent serves the store of all, and without it the others kill their ending workers, with status 1.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import DEFAULT_PORT
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import parse_min_max_nnodes

from dlora.errors import TransientError, UsageError
from dlora.runtime.exit_status import exit_with

TRAINING_OPTIONS = ("--config", "--check", "--print_config")
GRACE_SECONDS = 120  # between a stop signal and the kill: time to finish a step and commit
PARTING_SECONDS, POLL_SECONDS = 30, 0.1  # an agent waits for the others; it looks so often

USAGE = """usage: dlora launch [torchrun options] --config FILE [--section.key VALUE ...]

Everything before the first option of dlora.train goes to torchrun, for example:
  dlora launch --nproc-per-node 2 --config configs/quickstart.yaml --train.max_steps 10
  dlora launch --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
      --config configs/lora.yaml

torchrun --help lists its options, dlora train --help those of a run."""


def main(argv: list[str]) -> int:
    """Start the workers and wait for them; returns the exit status."""

    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    agent, training = split(argv)
    args = agent_options(agent, training)
    if args.shutdown_timeout is None:
        args.shutdown_timeout = GRACE_SECONDS
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads_per_worker(args.nproc_per_node))
    try:
        torchrun.run(args)
    except (ChildFailedError, SignalException) as error:
        part(args)  # `error` owns the store on which the others meet
        return status_of(error)
    except RendezvousError as error:
        where = f" on {args.rdzv_endpoint}" if args.rdzv_endpoint else ""
        reason = str(error) or type(error).__name__
        raise TransientError(
            f"the nodes' agents cannot reach each other{where}: {reason}; check --rdzv-endpoint"
        ) from error
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):  # the status is known; Python ends slowly
            signal.signal(number, signal.SIG_IGN)
    return 0


def status_of(error: Any) -> int:
    """The status of the first worker that failed, or else 128 + the signal that ended the agent."""

    failed = error if isinstance(error, ChildFailedError) else error.__context__
    if not isinstance(failed, ChildFailedError):
        return 128 + int(error.sigval)
    _, failure = failed.get_first_failure()
    return int(failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode)


def part(args: Any) -> None:
    """Wait until the agents of all nodes are here, PARTING_SECONDS at most; a signal ends it."""

    least, most = parse_min_max_nnodes(args.nnodes)
    if args.rdzv_backend != "c10d" or not least == most > 1:
        return
    is_enough, until = threading.Event(), time.monotonic() + PARTING_SECONDS
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: is_enough.set())
    host, port = parse_rendezvous_endpoint(args.rdzv_endpoint, default_port=DEFAULT_PORT)
    try:
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        here = dist.PrefixStore(f"dlora-parting-{args.rdzv_id}", store)
        here.add("agents", 1)
        while here.add("agents", 0) < most and time.monotonic() < until:
            if is_enough.wait(POLL_SECONDS):
                return
        is_enough.wait(3 * POLL_SECONDS)  # until the others have asked as well
    except dist.DistError:  # the agent that serves the store is gone
        return


def agent_options(agent: list[str], training: list[str]) -> Any:
    """Parse torchrun's options with torchrun's own parser.

    Raises:
        UsageError: an option is unknown or wrong, or an argument is not an option.
    """

    def refuse(message: str) -> NoReturn:
        raise UsageError(f"{message} (torchrun --help lists its options)")

    parser = torchrun.get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_args([*agent, "-m", "dlora.train", *training])
    if args.training_script != "dlora.train":
        raise UsageError(
            f"{args.training_script}: unexpected argument; torchrun's options come first, then "
            "those of dlora.train: --config FILE"
        )
    for option, read in (
        ("nproc-per-node", torchrun.determine_local_world_size),
        ("nnodes", lambda text: min(torchrun.parse_min_max_nnodes(text))),
    ):
        value = getattr(args, option.replace("-", "_"))
        try:
            count = read(value)
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"--{option} {value}: {error}") from None
        if count < 1:
            raise UsageError(f"--{option} {value}: must be at least 1")
    return args


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line into torchrun's options and those of dlora.train."""
    for index, word in enumerate(argv):
        if word.split("=")[0] in TRAINING_OPTIONS or (
            word.startswith("--") and "." in word.split("=")[0]
        ):
            return argv[:index], argv[index:]
    return argv, []


def threads_per_worker(workers: str) -> int:
    """Cores of this machine for each of its workers; torchrun would set 1 for all."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(workers)) if workers.isdigit() else 1


if __name__ == "__main__":
    exit_with(main)
