"""On each rank of two nodes: a training run for each `sharding.base`, and what crosses meanwhile.

    crossing_bytes.py DIRECTORY SETTINGS

SETTINGS are those of `command_line`, as JSON. A run writes to DIRECTORY/BASE, and each rank what it
counted to DIRECTORY/rank-K.json.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import ranks
import torch
import torch.distributed as dist
from network import resent_bytes, sent_bytes
from run_training import command_line, prepared_run

from dlora.runtime.ranks import Ranks
from dlora.sharding.replica.replicated_state import ReplicatedState

BASES = ("node", "world")
TIMEOUT_SECONDS = 60


def counted(argv: list[str]) -> dict[str, Any]:
    """Train; what this node had sent after each optimizer step, and what a step should take."""
    run = prepared_run(argv)
    sent: list[int] = []
    resent: list[int] = []

    def mark(*_: Any) -> None:
        dist.barrier()  # every byte of the step has been received, and so it was sent
        sent.append(sent_bytes())
        resent.append(resent_bytes())
        dist.barrier()  # and no byte of the next one was

    run.optimizer.register_step_post_hook(mark)
    assert run.train() == 0
    return {
        "steps": [after - before for before, after in pairwise(sent)],
        "resent": [after - before for before, after in pairwise(resent)],
        "adapter": 4 * run.replica.numel,
        "reduced": 4 * ReplicatedState.lengths(run.replica.named, run.prepared.topology)[1],
        "gathers": run.prepared.budget.gathers,
    }


def main(directory: Path, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    runtime = Ranks.from_environment(TIMEOUT_SECONDS, torch.device("cpu"))
    runtime.join()
    found = {}
    for base in BASES:
        ranks.current_store = dist.PrefixStore(base, runtime.store)
        out = str(directory / base)
        argv = command_line(**settings, sharding__base=base, output__dir=out)
        found[base] = counted(argv)
    (directory / f"rank-{runtime.rank}.json").write_text(json.dumps(found))
    runtime.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
