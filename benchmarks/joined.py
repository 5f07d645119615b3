"""On each rank: time steps of several adapters in one run, and what they send and hold.

Started by `together.py`, on this machine alone or on two nodes of `network.py`; rank 0 writes what
was measured. A row is the pass, reduction, clip and step of a run's loop, on `step.py`'s model with
one sequence of 256 tokens an adapter and rank:
    one         one run of one adapter, as `dlora.train` makes it: what all others are compared with
    1, 2, 4, …  so many adapters in one run (`adapters:`)
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from network import sent_bytes
from rows import SHAPE, TOKENS, R, adamw, adapter_parameters, base_model
from rows import Row as PlainRow
from torch import Tensor

from dlora import LoraConfig, attach, shard
from dlora.data import Example
from dlora.data.collate import Batch, collate
from dlora.lora.names import attached
from dlora.methods.trained_replica import replica_of
from dlora.objectives.chunked_loss import install
from dlora.objectives.sft import Sft
from dlora.runtime.memory import MemoryMeter, trim_after_step, unmap_large_blocks
from dlora.sharding.comm_bytes import WireCounter
from dlora.sharding.engines.storage import held_bytes
from dlora.sharding.replica.joint import Addend, JointReduction
from dlora.together.join import join

ONE = "one"
# Seconds of a step and of a rank's processor; bytes that an interface has sent, whoever sent them,
# and ring-equivalent bytes by dlora's own counter.
MEASURED = ("seconds", "cpu_seconds", "sent_bytes", "counted_bytes")
CPU = torch.device("cpu")


@dataclass
class Row(PlainRow):
    """One way of doing the step, with dlora's counter of what it sends."""

    wire: WireCounter


def batch_of(adapter: int) -> Batch:
    """A micro-batch of one sequence, another one for each adapter and rank; all are targets."""
    generator = torch.Generator().manual_seed(1000 * adapter + dist.get_rank())
    ids = torch.randint(0, SHAPE["vocab_size"], (TOKENS,), generator=generator).int().numpy()
    return collate([Example(0, ids, ids)], pad_id=0)


def one() -> Row:
    """The step of a run of one adapter."""
    model = base_model()
    attach(model, LoraConfig(r=R))
    replica = shard(model, engine="fsdp2", base="world", resident=0.0)
    install(model)
    optimizer, batch, objective = adamw(replica), batch_of(0), Sft(None)
    values = attached(model)["default"].values

    def step() -> None:
        with values.shared():
            loss = objective.loss(model, batch)
            loss.backward()
        scalars = {"loss": loss.detach()}
        reduced = replica.reduce_gradients(batch.num_targets, scalars=scalars)
        replica.clip(1.0, reduced.norm)
        optimizer.step()
        replica.zero_grad()
        trim_after_step(CPU)

    return Row(step, held_bytes(model), replica.wire)


def together(adapters: int) -> Row:
    """The step of a run of several, with the pieces of `dlora/together/run.py`."""
    model = base_model()
    shared = shard(model, engine="fsdp2", base="world", resident=0.0)
    batches = {f"a{k}": batch_of(k) for k in range(adapters)}
    for name in batches:
        attach(model, LoraConfig(r=R), name)
    install(model)
    replicas = {name: replica_of(model, name) for name in batches}
    optimizers = {name: adamw(replica) for name, replica in replicas.items()}
    reduction = JointReduction(list(replicas.values()), shared.reduction)
    objective, seeds = Sft(None), dict.fromkeys(batches, 0)

    def step() -> None:
        joined = join(list(batches.items()), 0, packs=True)
        values = next(iter(attached(model).values())).values
        with values.shared(), joined.computing(model, seeds, 0):
            losses = objective.loss_of_parts(model, joined.batch, joined.parts(model))
            losses.sum().backward()
        addends = [
            Addend(share.batch.num_targets, {"loss": loss})
            for share, loss in zip(joined.shares, losses.detach(), strict=True)
        ]
        found = reduction.reduce_gradients(addends)
        for (name, replica), reduced in zip(replicas.items(), found, strict=True):
            replica.clip(1.0, reduced.norm)
            optimizers[name].step()
            replica.zero_grad()
        trim_after_step(CPU)

    return Row(step, held_bytes(model), shared.wire)


def row_of(name: str) -> Callable[[], Row]:
    return one if name == ONE else functools.partial(together, int(name))


def activation_bytes() -> int:
    """What autograd keeps from the forward pass of one adapter to its backward, W0 left out.

    On a whole base, whose storages are known; each storage counts once.
    """
    model = base_model()
    attach(model, LoraConfig(r=R))
    install(model)
    frozen = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in frozen:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = Sft(None).loss(model, batch_of(0))
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def most(values: Any) -> Tensor:
    """The largest over ranks."""
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found


def seconds_and_bytes(names: list[str], rounds: int, interface: str) -> dict[str, Any]:
    """Of each row what `MEASURED` names, round by round, of the rank that has most of it."""
    rows = {name: row_of(name)() for name in names}
    for row in rows.values():
        for _ in range(2):  # the first makes buffers, connections and optimizer state
            row.step()
    own = [[_measured(row, interface) for row in rows.values()] for _ in range(rounds)]
    found = most(own)
    return {
        name: dict(zip(MEASURED, found[:, i].T.tolist(), strict=True))
        for i, name in enumerate(rows)
    }


def _measured(row: Row, interface: str) -> list[float]:
    row.wire.take()
    dist.barrier()
    before, began, cpu = sent_bytes(interface), time.perf_counter(), time.process_time()
    row.step()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    dist.barrier()  # all that was sent has been received
    return [seconds, cpu, sent_bytes(interface) - before, row.wire.take()]


def peak(name: str, meter: MemoryMeter) -> dict[str, Any]:
    """The most anonymous bytes of a rank in a step of one row, above those after the imports."""
    row = row_of(name)()
    for _ in range(2):
        row.step()
    meter.recent()  # building it took more
    for _ in range(3):
        row.step()
    [[found]] = most([[meter.recent()]]).tolist()
    return {"peak": found, "held": row.held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=0, help="0: peaks, of one row")
    parser.add_argument("--interface", default="lo")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    unmap_large_blocks()  # as every run does on a CPU
    meter = MemoryMeter()
    dist.init_process_group("gloo")
    if args.rounds:
        found = seconds_and_bytes(args.rows, args.rounds, args.interface)
    else:
        found = peak(args.rows[0], meter)
        if args.rows[0] == ONE:
            numbers = adapter_parameters(base_model())
            found |= {"adapter_numbers": numbers, "activations": activation_bytes()}
    if dist.get_rank() == 0:
        args.json.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
