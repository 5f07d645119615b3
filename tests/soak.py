"""Half an hour of runs that are stopped and killed, and one that nobody disturbs grows no memory.

    python tests/soak.py --minutes 30 --seed 0

Runs of 120 steps over two ranks, LoRA and AdaLoRA, fsdp2, none and zero3 in turn, are hit up to six
times each by SIGKILL, SIGTERM or SIGINT on one rank at a random moment; each goes on by the same
command and has to end bit for bit as the undisturbed one. See `training/kill_trials.py`.
"""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "training")]

from kill_trials import Trials  # noqa: E402

from dlora.metrics.log import read_metrics  # noqa: E402

STEPS, SAVE_EVERY, MOST = 120, 5, 6
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
GROWTH_MB = 4.0  # of peak memory, from the second quarter of a run to its last


def grown_mb(directory: Path) -> float:
    """Highest memory of a run's last quarter less that of its second."""
    peaks = [line["peak_memory_bytes"] for line in read_metrics(directory / "metrics.jsonl")]
    quarter = len(peaks) // 4
    return (max(peaks[3 * quarter :]) - max(peaks[quarter : 2 * quarter])) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    until, made, failed = time.monotonic() + 60 * args.minutes, 0, 0
    with tempfile.TemporaryDirectory() as root:
        options = {"steps": STEPS, "save_every": SAVE_EVERY, "most": MOST, "signals": SIGNALS}
        trials = Trials(Path(root), **options)  # type: ignore[arg-type]
        while time.monotonic() < until:
            failed += not trials.tell(args.seed + made)
            made += 1
        grown = {path.parent.name: grown_mb(path) for path in trials.undisturbed}
    print(f"{made - failed} of {made} runs, hit {trials.hits} times, ended as undisturbed ones")
    for name, megabytes in grown.items():
        print(f"{name}: {megabytes:.1f} MB more in the last quarter than in the second")
    return 1 if failed or max(grown.values()) > GROWTH_MB else 0


if __name__ == "__main__":
    raise SystemExit(main())
