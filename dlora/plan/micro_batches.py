"""What a micro-batch is: so many sequences, so many tokens, or as many as the plan fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dlora.config.load import Config
from dlora.data import Dataset, Dealing
from dlora.data.collate import PAD_TO, in_eights
from dlora.data.stream import Stream
from dlora.errors import UsageError
from dlora.plan.choose import Decision

KEY = "train.tokens_per_micro_batch"
_FINER = 2  # bisections between what fits and twice as much

Decide = Callable[[Dealing], Decision]


def settle_micro_batches(
    config: Config,
    data: Dataset | Stream | None,
    world: int,
    packs: bool,
    decide: Decide,
    *,
    earlier: int | None = None,
) -> tuple[Dealing, Decision]:
    """How micro-batches are made, and the plan for them.

    Args:
        data: what is trained on; None: every sequence may have `data.max_length` tokens.
        decide: plans for a dealing.
        earlier: what `auto` was in the run that is resumed, on as many ranks.

    Raises:
        UsageError: a sequence does not fit, or nothing fits the memory budget.
    """
    setting, size = config.train.tokens_per_micro_batch, config.train.micro_batch_size
    if setting is None:
        dealing = Dealing(size, packs=packs)
        return dealing, decide(dealing)
    # Of a stream later windows may have longer sequences than the one in memory.
    longest = data.report.longest if isinstance(data, Dataset) else config.data.max_length
    tokens = earlier if setting == "auto" else setting
    if tokens is not None:
        if data is None:  # its sequences may be shorter
            tokens = max(tokens, longest)
        if in_eights(tokens) < longest:
            raise UsageError(
                f"{KEY}: {tokens} is less than the {longest} tokens of the longest sequence; "
                "raise it or lower data.max_length"
            )
        dealing = Dealing(size, tokens, packs)
        return dealing, decide(dealing)
    return _most_that_fit(_share(config, data, world), in_eights(longest), size, packs, decide)


def _share(config: Config, data: Dataset | Stream | None, world: int) -> int:
    """Tokens of a rank in a step, at most: more than these in a micro-batch are of no use."""
    sequences = config.train.global_batch_size
    if isinstance(data, Dataset):
        lengths = sorted(map(int, data.lengths), reverse=True)
        repeated = -(-sequences // max(1, len(lengths)))
        return -(-sum((lengths * repeated)[:sequences]) // world)
    return -(-sequences * config.data.max_length // world)


def _most_that_fit(
    most: int, least: int, size: int, packs: bool, decide: Decide
) -> tuple[Dealing, Decision]:
    """The largest micro-batch that needs no other placement than the smallest one does."""
    smallest = Dealing(size, least, packs)
    found, plan = smallest, decide(smallest)

    def tried(tokens: int) -> bool:
        nonlocal found, plan
        dealing = Dealing(size, tokens, packs)
        try:
            decision = decide(dealing)
        except UsageError:  # it does not fit the budget
            return False
        if decision.warning or _chosen(decision) != _chosen(plan):
            return False
        found, plan = dealing, decision
        return True

    if plan.warning:
        return found, plan
    high = max(least, in_eights(most + PAD_TO * size))
    tokens = high
    while tokens > least and not tried(tokens):
        high, tokens = tokens, in_eights(tokens // 2)
    low = found.tokens
    for _ in range(_FINER if low < high else 0):
        middle = in_eights((low + high) // 2)
        if not low < middle < high:
            break
        low, high = (middle, high) if tried(middle) else (low, middle)
    return found, plan


def _chosen(decision: Decision) -> tuple[Any, ...]:
    plan = decision.plan
    return plan.placement, plan.divided, plan.workload.checkpointing
