"""Step time and bytes between two nodes of one LoRA step, over a slow link.

    python benchmarks/two_nodes.py [--rounds 3] [--rows dlora_node peft_flat] [--ranks-per-node 1]

The nodes are network namespaces on this machine (`network.py`), joined by 1 Gbit/s, and then by
100 Mbit/s with 1 ms of delay. The model and the step are those of `step.py`. Rows:
    dlora_node    dlora, a copy of W0 on each node: only adapter gradients cross
    dlora_world   dlora, W0 over all ranks: gathered across the link
    peft_flat     PEFT adapters inside `fully_shard` per block, over all ranks
    peft_hybrid   the same on a 2-D mesh: sharded inside the node, replicated across nodes
With one rank per node, a copy on each node is a copy on each rank. Every row runs in the same
processes and they alternate round by round; medians are reported, and how much faster than
peft_flat a row is, is the median of the per-round ratios. Bytes are those that the link's interface
sends from one node, protocol headers included.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from crossing import BUILDERS
from network import Link, permitted, two_nodes
from rows import adapter_parameters, base_model

NODES = 2
LINKS = (Link(mbit=1000), Link(mbit=100, delay_ms=1))
LIMIT_SECONDS = 1200.0  # of one link


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=BUILDERS, default=list(BUILDERS))
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so the network is removed
    for link in LINKS:
        if reason := permitted(link):
            sys.exit(reason)
    rows = list(dict.fromkeys([*args.rows, "peft_flat"]))
    # float32 gradients of A and B, reduced over nodes in a ring
    needed = round(2 * (NODES - 1) / NODES * 4 * adapter_parameters(base_model()))
    links = []
    for link in LINKS:
        measured = on(link, rows, args.rounds, args.ranks_per_node)
        links.append({"link": str(link), "rows": table(measured, needed)})
        show(link, links[-1]["rows"], needed)
    summary = {
        "nodes": NODES,
        "ranks_per_node": args.ranks_per_node,
        "rounds": args.rounds,
        "needed_bytes": needed,
    }
    args.json.write_text(json.dumps({**summary, "links": links}, indent=2) + "\n")


def on(link: Link, rows: list[str], rounds: int, ranks_per_node: int) -> dict[str, Any]:
    """What `crossing.py` measures on two nodes that `link` joins, by row."""
    with tempfile.TemporaryDirectory() as directory:
        written = Path(directory) / "measured.json"
        program = [str(Path(__file__).with_name("crossing.py")), "--rows", *rows]
        program += ["--rounds", str(rounds), "--json", str(written)]
        with two_nodes(link, Path(directory)) as nodes:
            nodes.torchrun(program, limit=LIMIT_SECONDS, ranks_per_node=ranks_per_node)
        return json.loads(written.read_text())


def table(measured: dict[str, Any], needed: int) -> list[dict[str, Any]]:
    flat = measured["peft_flat"]
    flat_bytes = statistics.median(flat["crossing_bytes"])
    lines = []
    for name, row in measured.items():
        nbytes = statistics.median(row["crossing_bytes"])
        ratios = [f / own for f, own in zip(flat["seconds"], row["seconds"], strict=True)]
        lines.append(
            {
                "row": name,
                "step_seconds": statistics.median(row["seconds"]),
                "faster_than_flat": statistics.median(ratios),
                "crossing_mb_per_node": nbytes / 1e6,
                "over_flat": nbytes / flat_bytes,
                "over_needed": nbytes / needed,
                **row,
            }
        )
    return lines


def show(link: Link, lines: list[dict[str, Any]], needed: int) -> None:
    print(f"{link}; the reduction of A's and B's gradients needs {needed / 1e6:.2f} MB per node")
    print(f"{'row':12}{'step s':>9}{'x faster':>10}{'cross MB':>10}{'/ flat':>8}{'/ needed':>10}")
    for line in lines:
        print(
            f"{line['row']:12}{line['step_seconds']:9.3f}{line['faster_than_flat']:10.2f}"
            f"{line['crossing_mb_per_node']:10.2f}{line['over_flat']:8.3f}"
            f"{line['over_needed']:10.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
