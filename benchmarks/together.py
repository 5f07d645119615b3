"""Several adapters in one run beside a run of each: time, bytes and memory.

    python benchmarks/together.py [--adapters 1 2 4 8] [--rounds 7] [--links loopback 100]

`step.py`'s model and adapters on two ranks, W0 divided over them by FSDP2 and gathered in every
pass, 256 tokens an adapter and rank. One run of one adapter and runs of K adapters (`joined.py`)
are in the same processes and alternate round by round, on the loopback, and then over
`two_nodes.py`'s link of 100 Mbit/s with 1 ms (root; see there). Of each K:
    per adapter     seconds of a step / K
    over K runs     the step over K steps of one run, median of the ratios within a round
    CPU over K runs the same of the ranks' processors, which other work on a machine hardly moves
    over needed     bytes sent over what one run's gathers of W0 and K adapters' gradients need, by
                    the interface, and by dlora's own counter
Peaks are of processes that have one row alone, anonymous memory in steps above that after imports;
the bound is the peak of one run and K − 1 times an adapter, its gradient, two moments and
activations, and 5 %.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from network import INTERFACE, Link, permitted, two_nodes
from rows import base_model
from step import expected_bytes

RANKS = 2
ONE = "one"
SLOW = Link(mbit=100, delay_ms=1)
LIMIT_SECONDS = 3600.0
STATE_BYTES = 16  # of a number of an adapter: itself, its gradient, two moments
TOLERANCE = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapters", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--links", nargs="*", choices=["loopback", "100"], default=["loopback", "100"]
    )
    parser.add_argument("--no-peaks", action="store_true", help="leave memory out")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so the network is removed
    if "100" in args.links and (reason := permitted(SLOW)):
        sys.exit(f"{reason}; --links loopback does without")
    rows = [ONE, *map(str, args.adapters)]
    model = base_model()
    gathers, reduction = expected_bytes(model, RANKS)
    # The last block stays gathered from forward to backward.
    last = sum(p.nbytes for p in model.model.layers[-1].parameters())
    gathers -= last * (RANKS - 1) / RANKS
    summary: dict[str, Any] = {"ranks": RANKS, "rounds": args.rounds}
    summary |= {"gathers": gathers, "reduction": reduction, "links": []}
    for name in args.links:
        words = ["--rows", *rows, "--rounds", str(args.rounds)]
        found = on_loopback(words) if name == "loopback" else on_link(words)
        shared = RANKS if name == "loopback" else 1  # the loopback counts what all ranks send
        link = {"link": str(SLOW) if name == "100" else name}
        link["rows"] = table(found, args.adapters, gathers, reduction, shared)
        summary["links"].append(link)
        show(link)
    if not args.no_peaks:
        peaks = {row: on_loopback(["--rows", row]) for row in rows}
        summary["peaks"] = bounds(peaks, args.adapters)
        show_peaks(summary["peaks"])
    args.json.write_text(json.dumps(summary, indent=2) + "\n")


def on_loopback(words: list[str]) -> dict[str, Any]:
    """What `joined.py` writes on two ranks of this machine."""
    with tempfile.TemporaryDirectory() as directory:
        written = Path(directory) / "found.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, f"--nproc-per-node={RANKS}", *program(words, written)]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        return json.loads(written.read_text())


def on_link(words: list[str]) -> dict[str, Any]:
    """The same on two nodes of one rank that the slow link joins."""
    with tempfile.TemporaryDirectory() as directory:
        written = Path(directory) / "found.json"
        with two_nodes(SLOW, Path(directory)) as nodes:
            whole = program([*words, "--interface", INTERFACE], written)
            nodes.torchrun(whole, limit=LIMIT_SECONDS)
        return json.loads(written.read_text())


def program(words: list[str], written: Path) -> list[str]:
    return [str(Path(__file__).with_name("joined.py")), *words, "--json", str(written)]


def table(
    found: dict[str, Any], adapters: list[int], gathers: float, reduction: float, shared: int
) -> list[dict[str, Any]]:
    """A line of each row; bytes are of one rank."""
    alone, lines = found[ONE], []
    for name, count in [(ONE, 1), *((str(k), k) for k in adapters)]:
        own = found[name]
        sent = statistics.median(own["sent_bytes"]) / shared
        lines.append(
            {
                "row": name,
                "step_seconds": statistics.median(own["seconds"]),
                "per_adapter": statistics.median(own["seconds"]) / count,
                "over_runs": over(own, alone, "seconds", count),
                "cpu_over_runs": over(own, alone, "cpu_seconds", count),
                "wire_mb_per_rank": sent / 1e6,
                "over_needed": sent / (gathers + count * reduction),
                "counted_over_needed": statistics.median(own["counted_bytes"])
                / (gathers + count * reduction),
                **own,
            }
        )
    return lines


def over(own: dict[str, Any], alone: dict[str, Any], what: str, count: int) -> float:
    """The median over rounds of a row's share of `count` runs of one adapter."""
    pairs = zip(own[what], alone[what], strict=True)
    return statistics.median(mine / (count * one) for mine, one in pairs)


def bounds(peaks: dict[str, Any], adapters: list[int]) -> dict[str, Any]:
    """Each row's peak, and the bound."""
    one = peaks[ONE]
    own = STATE_BYTES * one["adapter_numbers"] + one["activations"]
    rows = {
        row: {
            "peak": found["peak"],
            "bound": TOLERANCE * (one["peak"] + (count - 1) * own),
            "w0_held": found["held"],
        }
        for (row, found), count in zip(peaks.items(), [1, *adapters], strict=True)
    }
    return {"adapter": own, "activations": one["activations"], "rows": rows}


def show(link: dict[str, Any]) -> None:
    print(link["link"])
    print(
        f"{'adapters':10}{'step s':>9}{'per adapter':>13}{'/ K runs':>10}{'CPU / K runs':>14}"
        f"{'wire MB':>10}{'/ needed':>10}{'counted':>9}"
    )
    for line in link["rows"]:
        print(
            f"{line['row']:10}{line['step_seconds']:9.3f}{line['per_adapter']:13.3f}"
            f"{line['over_runs']:10.3f}{line['cpu_over_runs']:14.3f}"
            f"{line['wire_mb_per_rank']:10.1f}{line['over_needed']:10.3f}"
            f"{line['counted_over_needed']:9.4f}",
            flush=True,
        )


def show_peaks(peaks: dict[str, Any]) -> None:
    activations = peaks["activations"] / 1e6
    print(f"an adapter with state and activations: {peaks['adapter'] / 1e6:.1f} MB", end=" ")
    print(f"(activations {activations:.1f} MB)")
    print(f"{'adapters':10}{'peak MB':>10}{'bound MB':>10}")
    for name, row in peaks["rows"].items():
        print(f"{name:10}{row['peak'] / 1e6:10.0f}{row['bound'] / 1e6:10.0f}", flush=True)


if __name__ == "__main__":
    main()
