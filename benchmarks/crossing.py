"""On each rank of two nodes: time LoRA steps, and count what crosses between the nodes.

Started by `two_nodes.py` inside a network of `network.py`; rank 0 writes what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from network import sent_bytes
from rows import Row, dlora, peft, random_batch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh


def dlora_node(batch: Tensor) -> Row:
    return dlora(batch, base="node")


def dlora_world(batch: Tensor) -> Row:
    return dlora(batch, base="world")


def peft_flat(batch: Tensor) -> Row:
    """W0, A and B sharded over all ranks."""
    return peft(batch, init_device_mesh("cpu", (dist.get_world_size(),)))


def peft_hybrid(batch: Tensor) -> Row:
    """W0, A and B sharded inside the node, and the same on both nodes."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    sizes, names = (dist.get_world_size() // local, local), ("replicate", "shard")
    return peft(batch, init_device_mesh("cpu", sizes, mesh_dim_names=names))


BUILDERS: dict[str, Callable[[Tensor], Row]] = {
    build.__name__: build for build in (dlora_node, dlora_world, peft_flat, peft_hybrid)
}


def measure(step: Callable[[], None]) -> tuple[float, int]:
    """(seconds on this rank, bytes that this rank's node sent to the other) of one step."""
    dist.barrier()
    before, began = sent_bytes(), time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    dist.barrier()  # all that was sent has been received
    return seconds, sent_bytes() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--rows", nargs="+", choices=BUILDERS, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    batch = random_batch(dist.get_rank())
    rows = {name: BUILDERS[name](batch) for name in args.rows}
    for row in rows.values():
        row.step()  # the first makes buffers, connections and optimizer state
    own = [[measure(row.step) for row in rows.values()] for _ in range(args.rounds)]
    # Of each round and row: seconds of the slowest rank, bytes of the node that sent most.
    most = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        seconds, nbytes = most[..., 0], most[..., 1].long()
        measured = {
            name: {"seconds": seconds[:, i].tolist(), "crossing_bytes": nbytes[:, i].tolist()}
            for i, name in enumerate(rows)
        }
        args.json.write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
