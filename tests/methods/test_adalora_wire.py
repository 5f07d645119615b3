"""Invariant 8 with AdaLoRA: a mask costs one sum of the scores, and what is pruned is not sent."""

from typing import Any

import pytest
from allocations import ADALORA, INITIAL, after_each_step
from collectives import CollectiveLog
from run_training import Runs, prepared_run
from sampling import full

from dlora.sharding.replica.hierarchical_reduce import padded

STEPS, MASKS, LAST = 9, (4, 6, 7), 7  # no audit but the one after the last step
SETTINGS = {
    "train__max_steps": STEPS,
    "adapter__tinit": 3,
    "adapter__tfinal": 2,
    "output__save_every": 0,
}


def logged(argv: list[str]) -> dict[str, Any]:
    """The collectives of each step up to and with its mask, and the sizes that they depend on."""
    run, steps, sizes, done = prepared_run(argv), [], [], 0
    replica = run.replica

    def see() -> None:
        nonlocal done
        steps.append(log.calls[done:])
        sizes.append(replica.numel)
        done = len(log.calls)

    with CollectiveLog() as log, after_each_step(see):
        run.train()
    topology = replica.topology
    return {
        "steps": steps,
        "numel": sizes,
        "scores": 4 * padded(INITIAL, topology),
        "reduction": replica.strategy.wire_bytes(replica.named, topology),
        "padding": topology.ranks_per_node * 4,
    }


@pytest.mark.parametrize(
    ("engine", "base", "world", "per_node", "state"),
    [
        # 5 s: where W0 is whole, less is sent than below, and of the scores the same
        full("fsdp2", "none", 3, 3, "replicated"),
        ("fsdp2", "node", 4, 2, "replicated"),
        full("zero3", "world", 2, 2, "replicated"),  # 4 s: scores know no engine
        ("fsdp2", "world", 2, 2, "divided"),
    ],
)
def test_one_sum_for_each_mask(
    run: Runs, engine: str, base: str, world: int, per_node: int, state: str
) -> None:
    """4 bytes for each triplet in ring-equivalent bytes, and nothing for the regulariser."""
    where = {"sharding__engine": engine, "sharding__base": base, "sharding__optimizer_state": state}
    settings = {"train__global_batch_size": world, "train__micro_batch_size": 1} | where
    settings = ADALORA | SETTINGS | settings
    results, lines = run("run", world, work=logged, per_node=per_node, **settings)
    recorded = [line["wire_bytes"] for line in lines]
    for result in results:
        sent = [sum(c.sent() for c in calls if c.op != "broadcast_") for calls in result["steps"]]
        first = 2 if engine == "zero3" else 0  # until DeepSpeed has its trace
        plain = sent[2]  # a step without a mask
        ring = 2 * result["scores"] * (world - 1) / world
        if world > per_node:  # inside nodes, and 1/G of it across them
            inside = 2 * result["scores"] * (per_node - 1) / per_node
            ring = inside + result["scores"] / per_node * 2 * (2 - 1) / 2
        for step in range(first + 1, LAST):
            assert sent[step - 1] == plain + (ring if step in MASKS else 0), step
            extra = len(result["steps"][step - 1]) - len(result["steps"][2])
            levels = 3 if world > per_node else 1
            assert extra == (levels if step in MASKS else 0), step
        # Afterwards the reduction is of what is left, of which each element costs what it did.
        pruned = result["numel"][LAST - 2] - result["numel"][LAST - 1]
        assert pruned > 0.3 * result["numel"][0]
        saved = plain - sent[LAST]
        each = 2 * (world - 1) / world
        if world > per_node:
            each = 2 * (per_node - 1) / per_node + 2 * (2 - 1) / 2 / per_node
        assert saved == pytest.approx(4 * pruned * each, abs=2 * each * result["padding"])
        assert sent[LAST] == sent[LAST + 1]
    # What the metrics say is what was sent.
    sent = [sum(c.sent() for c in calls if c.op != "broadcast_") for calls in results[0]["steps"]]
    kept = range(first, STEPS - 1) if state == "replicated" else [*range(LAST - 1), LAST]
    for step in kept:
        assert recorded[step] == round(sent[step])
    assert recorded[-1] == round(sent[-1]) + 8 * (world - 1)  # the audit
    # Where the moments are divided they are laid out anew after the last mask: the one time that
    # anything is broadcast, but by DeepSpeed in its first steps.
    for result in results:
        ops = [{call.op for call in calls} for calls in result["steps"]]
        moved = ["broadcast_" in found for found in ops]
        wanted = [state == "divided" and step == LAST for step in range(1, STEPS + 1)]
        assert moved[first:] == wanted[first:]
