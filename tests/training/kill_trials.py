"""Kill a random rank at a random moment, as often as one likes, and compare the end bit for bit.

    python tests/training/kill_trials.py --trials 40 --seed 0

A trial is a run of two ranks that saves at every step. One to three times a rank gets SIGKILL, at a
moment drawn from the length of an undisturbed run, so that reading, training, saving and ending are
all hit; the other rank has some seconds to end by itself and is killed then, as an agent does. The
same command goes on until the run ends, and what it leaves has to be what the undisturbed run left.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from run_training import command_line
from tiny import save_chats, save_model
from two_ranks import Ranks, check_same_end

GRACE_SECONDS = 6.0
ADALORA = {
    "adapter__method": "adalora",
    "adapter__r": None,
    "adapter__init_r": 6,
    "adapter__target_r": 3,
    "adapter__tinit": 1,
    "adapter__tfinal": 4,
}
KINDS: dict[str, dict[str, Any]] = {
    "lora fsdp2": {"sharding__base": "world"},
    "adalora fsdp2": {"sharding__base": "world"} | ADALORA,
    "lora none": {"sharding__base": "none"},
    "adalora none": {"sharding__base": "none"} | ADALORA,
    "lora zero3": {"sharding__base": "world", "sharding__engine": "zero3"},
}


@dataclass
class Whole:
    """An undisturbed run: where it is, and how long it took."""

    directory: Path
    seconds: float


class Trials:
    """Trials in one directory, beside the undisturbed runs that they are compared with.

    Args:
        steps, save_every: of a run.
        most: times that a run is hit, at most.
        signals: what it is hit with, one drawn each time.
    """

    def __init__(
        self,
        root: Path,
        *,
        steps: int = 8,
        save_every: int = 1,
        most: int = 3,
        signals: Sequence[signal.Signals] = (signal.SIGKILL,),
    ) -> None:
        self._root = root
        self._steps, self._save_every = steps, save_every
        self._most, self._signals = most, signals
        self.hits = 0
        self._wholes: dict[str, Whole] = {}
        save_model(root / "model", "llama")
        self._data = save_chats(root / "chats.jsonl", 24)

    def run(self, seed: int) -> str:
        """Make a trial; what happened in it.

        Raises:
            AssertionError: the run ended otherwise than the undisturbed one.
        """
        draw = random.Random(seed)
        kind = list(KINDS)[seed % len(KINDS)]
        whole, directory = self._whole(kind), self._root / f"trial-{seed}"
        argv = self._command(kind, directory / "run")
        hits = []
        for number in range(draw.randint(1, self._most)):
            victim, moment = draw.randrange(2), draw.uniform(0, whole.seconds)
            hit = draw.choice(self._signals)
            ranks = Ranks(argv, directory / f"printed-{number}")
            if ranks.status(victim, moment) is None:
                ranks.send(victim, hit)
                hits.append(f"{hit.name} to rank {victim} at {moment:.2f} s")
            for rank in range(2):
                ranks.status(rank, GRACE_SECONDS)
            ranks.end()
        self.hits += len(hits)
        last = Ranks(argv, directory / "printed-last")
        last.finish()
        check_same_end(directory / "run", whole.directory, kind.split()[1])
        shutil.rmtree(directory)
        return f"{kind}: {', '.join(hits) or 'had ended before'}"

    def tell(self, seed: int) -> bool:
        """Make a trial and print what happened; whether it ended as the undisturbed run."""
        try:
            print(f"{seed}: {self.run(seed)}: the same", flush=True)
        except AssertionError as error:
            print(f"{seed}: FAILED: {error}", flush=True)
            return False
        return True

    @property
    def undisturbed(self) -> list[Path]:
        """The directories of the undisturbed runs."""
        return [whole.directory for whole in self._wholes.values()]

    def _whole(self, kind: str) -> Whole:
        if kind not in self._wholes:
            directory = self._root / f"whole-{kind.replace(' ', '-')}"
            began = time.monotonic()
            Ranks(self._command(kind, directory / "run"), directory / "printed").finish()
            self._wholes[kind] = Whole(directory / "run", time.monotonic() - began)
        return self._wholes[kind]

    def _command(self, kind: str, directory: Path) -> list[str]:
        common = {
            "model__path": str(self._root / "model"),
            "data__train": str(self._data),
            "output__dir": str(directory),
            "output__save_every": self._save_every,
            "train__max_steps": self._steps,
            "adapter__lora_dropout": 0.1,
            "sharding__timeout_seconds": 30,
        }
        return command_line(**common | KINDS[kind])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        trials = Trials(Path(root))
        failed = sum(not trials.tell(args.seed + number) for number in range(args.trials))
    print(f"{args.trials - failed} of {args.trials} ended as the undisturbed run")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
