"""Invariants 6 and 8: what crosses the wire is what the plan says, and a save sends nothing."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from collectives import CollectiveLog
from counted_runs import check_last_step, check_sent, counted, last_step
from run_training import Runs, prepared_run
from sampling import full, sampled

from dlora.adapters.save_load import save_adapter
from dlora.checkpoint.host_copy import capture
from dlora.checkpoint.writing import write

STEPS = 3


# model, base, ranks, ranks per node, micro-batches per step
SAMPLE = [
    ("llama", "world", 2, 2, 3),
    ("llama", "world", 3, 3, 1),
    ("llama", "node", 4, 2, 3),
    ("llama", "world", 4, 2, 1),
    ("llama", "none", 4, 2, 1),
    ("tied", "node", 4, 2, 1),
    ("gpt2", "world", 2, 2, 3),
    ("mixtral", "world", 2, 2, 1),
]
MATRIX = [
    (model, base, world, per_node, accumulation)
    for model in ("llama", "tied", "gpt2")
    for base in ("none", "node", "world")
    for world, per_node in ((2, 2), (2, 1), (3, 3), (4, 4), (4, 2))
    for accumulation in (1, 3)
]


@pytest.mark.parametrize(
    ("model", "base", "world", "per_node", "accumulation"), sampled(SAMPLE, MATRIX)
)
def test_the_plan_is_what_is_sent(
    run: Runs, model: str, base: str, world: int, per_node: int, accumulation: int
) -> None:
    """And one reduction for each step; with W0 inside the nodes, nothing else crosses between them,
    and 1/G of it per rank.

    promise 1.7: W0 per rank is what was printed.
    """
    settings = {
        "sharding__base": base,
        "train__max_steps": STEPS,
        "train__micro_batch_size": 1,
        "train__global_batch_size": world * accumulation,
    }
    results, lines = run("run", world, model, work=counted, per_node=per_node, **settings)
    audit = 8 * (world - 1)  # a checksum of 8 bytes, after the last step
    for result in results:
        check_sent(result, STEPS * (result["gathers"] + result["reduction"]) + audit)
        *calls, checksum = result["calls"]
        reductions = [call for call in calls if call.op == "allreduce_"]
        assert len(reductions) == STEPS
        assert (checksum.op, checksum.nbytes) == ("_allgather_base_", 8 * world)
        if base == "node" and world > per_node:
            assert [call for call in calls if call.crosses(per_node)] == reductions
            if per_node > 1:
                inside = [call for call in calls if call.op == "_reduce_scatter_base_"]
                assert [call.nbytes for call in inside] == [per_node * c.nbytes for c in reductions]
    per_step = results[0]["gathers"] + results[0]["reduction"]
    recorded = [line["wire_bytes"] for line in lines]
    assert recorded == [per_step] * (STEPS - 1) + [per_step + audit]


@pytest.mark.parametrize(
    ("model", "base", "world", "per_node", "accumulation", "recomputed"),
    [
        ("llama", "world", 3, 3, 3, False),
        full("llama", "world", 2, 2, 3, True),  # 3 s; GPT-2 below is recomputed as well
        full("tied", "world", 2, 2, 3, False),
        # 2 s each: these ranks and this base with one micro-batch, which GPT-2's run has
        full("llama", "world", 2, 2, 1, False),
        full("llama", "node", 4, 2, 1, False),
        ("gpt2", "world", 3, 3, 1, True),
        ("llama", "world", 2, 2, 1, {"every": 2}),  # the first block, and not the second
        ("mixtral", "node", 4, 2, 3, False),
    ],
)
def test_zero3_sends_what_the_plan_says(
    run: Runs, model: str, base: str, world: int, per_node: int, accumulation: int, recomputed: Any
) -> None:
    """From the third step on: in the first two DeepSpeed records its trace and gathers vectors.

    promise 4.1: A and B are outside by name, and gathers are counted.
    promise 4.4: it is local to a node without ZeRO++.
    """
    settings = {
        "sharding__engine": "zero3",
        "sharding__base": base,
        "sharding__activation_checkpointing": recomputed,
        "train__max_steps": 4,
        "train__micro_batch_size": 1,
        "train__global_batch_size": world * accumulation,
    }
    results, lines = run("run", world, model, work=last_step, per_node=per_node, **settings)
    for result in results:
        check_last_step(result)
    audit = 8 * (world - 1)
    recorded = [line["wire_bytes"] for line in lines]
    assert recorded[2:] == [result["planned"], result["planned"] + audit]


def saved_by_each(argv: list[str], directory: str) -> dict[str, Any]:
    """Train, then let every rank alone save all that a run saves; collectives meanwhile, sizes."""
    run = prepared_run(argv)
    run.train()
    rank, world = dist.get_rank(), dist.get_world_size()
    with CollectiveLog() as log:
        for turn in range(world):
            if turn == rank:
                root = Path(directory) / f"rank-{rank}"
                save_adapter(run.model, root / "adapter")
                state = capture(run.replica, run.replica.states(run.optimizer), {"step": STEPS})
                assert state is not None
                write(state, root / "checkpoints", "", keep_last=1)
                run.checkpoints.save(STEPS, {})
            time.sleep(0.05)
    return {
        "calls": log.calls,
        "trained": run.replica.numel,
        "tensors": len(run.replica.named),
        "base": run.prepared.budget.base_total,
    }


@pytest.mark.parametrize("base", ["world", "none"])
def test_any_rank_saves_everything_alone(run: Runs, tmp_path: Path, base: str) -> None:
    """No collective, the same bytes, and no more than A, B and their state.

    promise 1.5: bounded by what is trained; promise 3.4: published by any rank without W0.
    promise 4.6: only what was trained.
    """
    settings = {"sharding__base": base, "train__max_steps": STEPS}
    results, _ = run("run", 3, work=saved_by_each, arguments=(str(tmp_path),), **settings)
    saved = [
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*")}
        for root in (tmp_path / f"rank-{rank}" for rank in range(3))
    ]
    assert saved[0] == saved[1] == saved[2]
    assert "checkpoints/step-000003/optimizer.safetensors" in saved[0]
    for result in results:
        assert result["calls"] == []
        values, names = 4 * result["trained"], 150 * result["tensors"]
        adapter = sum(len(c) for name, c in saved[0].items() if name.startswith("adapter/"))
        checkpoint = sum(len(c) for name, c in saved[0].items() if name.startswith("checkpoints/"))
        assert values < adapter < values + names + 4096
        assert 3 * values < checkpoint < 3 * values + 4 * names + 4096  # two moments, a step count
        assert checkpoint < result["base"]
