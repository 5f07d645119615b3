"""Ranks that are processes of their own, started as by hand, without an agent: they may die."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from programs import become, free_port
from ranks import server
from run_training import figures

LIMIT_SECONDS = 300


def one_rank(rank: int, world: int, port: int, argv: list[str], printed: str, meddle: Any) -> None:
    """The life of a rank; `meddle` is a function from above and its argument, or None."""
    become(rank, world, port, printed, printed)
    torch.set_num_threads(1)
    from dlora.runtime.exit_status import exit_with
    from dlora.train import main

    if meddle is not None:
        meddle[0](meddle[1])
    sys.argv = ["dlora.train", *argv]
    exit_with(main)


class Ranks:
    """The ranks of one run, two of them unless there are `world`.

    Args:
        meddling: by rank, what `one_rank` is to meddle with.
    """

    def __init__(
        self, argv: list[str], directory: Path, *, world: int = 2, **meddling: Any
    ) -> None:
        port = free_port()
        context = server()
        directory.mkdir(parents=True, exist_ok=True)
        self._printed = [directory / f"rank-{rank}" for rank in range(world)]
        self.workers: list[Any] = []
        for rank, printed in enumerate(self._printed):
            arguments = (rank, world, port, argv, str(printed), meddling.get(f"rank{rank}"))
            self.workers.append(context.Process(target=one_rank, args=arguments, daemon=True))
            self.workers[-1].start()

    def send(self, rank: int, number: int) -> None:
        os.kill(self.workers[rank].pid, number)

    def wait_until_stopped(self, rank: int) -> None:
        """Until SIGSTOP has taken hold."""
        deadline = time.monotonic() + LIMIT_SECONDS
        stat = Path(f"/proc/{self.workers[rank].pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, self.printed(rank)
            time.sleep(0.05)

    def status(self, rank: int, limit: float = LIMIT_SECONDS) -> int | None:
        """The exit status; None if it still runs after `limit` seconds."""
        self.workers[rank].join(limit)
        return self.workers[rank].exitcode

    def printed(self, rank: int) -> str:
        return self._printed[rank].read_text(errors="replace")

    def finish(self) -> None:
        """All run to their end."""
        for rank in range(len(self.workers)):
            assert self.status(rank) == 0, self.printed(rank)

    def end(self) -> None:
        for worker in self.workers:
            if worker.is_alive():
                worker.kill()
            worker.join()


def check_same_end(directory: Path, wanted: Path, engine: str = "fsdp2") -> None:
    """The adapter, the last checkpoint, and each step once in the metrics: bit for bit."""
    last = max(path.name for path in (wanted / "checkpoints").glob("step-*"))
    for file in (
        "adapter/adapter_model.safetensors",
        f"checkpoints/{last}/adapter.safetensors",
        f"checkpoints/{last}/optimizer.safetensors",
    ):
        assert (directory / file).read_bytes() == (wanted / file).read_bytes(), file
    lines = [figures(directory), figures(wanted)]
    for line in (*lines[0], *lines[1]) if engine == "zero3" else ():
        del line["wire_bytes"]  # more in a process's first steps, until DeepSpeed has its trace
    assert lines[0] == lines[1]
    ranks = [path / "ranks.json" for path in (directory, wanted)]
    assert ranks[0].exists() == ranks[1].exists()
    assert not ranks[0].exists() or ranks[0].read_text() == ranks[1].read_text()
