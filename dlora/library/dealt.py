"""Work on many matrices, dealt over the ranks that torchrun started, or all of it on one.

    every rank   opens the same models, works on its own matrices, writes what it made of each
    rank 0       reads all of that in the order of the matrices, and writes the result

No matrix is divided and nothing is summed over ranks, so the result has the same bytes whatever
their number (and the same number of threads in each: their sums differ in the last bits).
"""

from __future__ import annotations

import heapq
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from dlora.errors import UsageError
from dlora.runtime.agreement import agree, broadcast
from dlora.runtime.memory import trim
from dlora.runtime.ranks import Ranks

JOINING_SECONDS = 600.0
PATIENCE_SECONDS = 7 * 86400.0  # ranks end their matrices at different times
T = TypeVar("T")


@dataclass(frozen=True)
class Parts:
    """A directory of what was made of each matrix, by its number."""

    directory: Path

    def write(self, number: int, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write the record, JSON-like, and the tensors of one matrix."""
        metadata = {"record": json.dumps(record)}
        self._file(number).write_bytes(save(dict(tensors), metadata=metadata))

    def record(self, number: int) -> dict[str, Any]:
        """The record of one matrix.

        Raises:
            UsageError: it is not here.
        """
        file = self._file(number)
        if not file.exists():
            raise UsageError(
                f"--to: {self.directory.parent} lacks what another rank made; all ranks need the "
                "same file system"
            )
        with safe_open(file, framework="pt") as opened:
            found: dict[str, Any] = json.loads(opened.metadata()["record"])
        return found

    def tensors(self, number: int) -> dict[str, Tensor]:
        """The tensors of one matrix, mapped from the file."""
        found: dict[str, Tensor] = load_file(self._file(number))
        return found

    def _file(self, number: int) -> Path:
        return self.directory / f"{number:06d}.safetensors"


def dealt(costs: Sequence[float], world: int) -> list[int]:
    """The rank of each piece of work: the dearest first, each to who has least to do so far."""
    owners, loads = [0] * len(costs), [(0.0, rank) for rank in range(world)]
    for number in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, owners[number] = heapq.heappop(loads)
        heapq.heappush(loads, (load + costs[number], owners[number]))
    return owners


def on_all_ranks(
    parse: Callable[[], T], run: Callable[[Ranks, T], None], ranks: Ranks | None = None
) -> int:
    """Run a command on every rank; its exit status.

    Args:
        parse: the command line.
        run: calls `agreed` for all that may fail.

    Raises:
        UsageError: on every rank, printed once.
    """
    if ranks is None:
        ranks = Ranks.from_environment(JOINING_SECONDS, torch.device("cpu"))
    ranks = replace(ranks, timeout_seconds=PATIENCE_SECONDS)
    run(ranks, agreed(ranks, "command line", parse))
    ranks.part("end")
    return 0


def agreed(ranks: Ranks, topic: str, work: Callable[[], T], fingerprint: str = "") -> T:
    """Do the same work on every rank, and go on only if none of them failed (see `agree`)."""
    result: T = agree(ranks, topic, lambda: (work(), fingerprint))
    return result


@contextmanager
def parts_beside(target: Path, ranks: Ranks) -> Iterator[Parts]:
    """A directory for what the ranks make, beside `target`; it is gone after the block.

    Raises:
        UsageError: on every rank, if it cannot be made.
    """

    def make() -> str | None:
        if not ranks.main:
            return None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            return tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        except OSError as error:
            raise UsageError(f"--to: cannot write {target}: {error.strerror}") from error

    made = agreed(ranks, "parts", make)
    directory = broadcast(ranks, "parts/place", made)
    try:
        yield Parts(Path(directory))
    finally:
        if ranks.main:
            shutil.rmtree(directory, ignore_errors=True)


def work_on(
    ranks: Ranks, costs: Sequence[float], target: Path, work: Callable[[int], None]
) -> None:
    """Call `work` with the number of each piece that is this rank's.

    Args:
        costs: of each piece, in any unit.
        target: of the command, for errors.

    Raises:
        UsageError: on every rank, if one of them cannot do its work or not write it.
    """

    def own() -> None:
        for number, owner in enumerate(dealt(costs, ranks.world)):
            if owner == ranks.rank:
                with naming_target(target):
                    work(number)
                trim()  # or the memory of one matrix adds to that of the next

    agreed(ranks, "matrices", own)


@contextmanager
def naming_target(target: Path) -> Iterator[None]:
    """Inside, a file that cannot be written is one line about `--to`."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"--to: cannot write {target}: {error.strerror or error}") from error
