"""What a model answers to many prompts, greedily: batches dealt over ranks, all answers on each.

On a sharded base every rank goes on with passes until the last one has its answers, so that gathers
match. No rank has more batches than another; one that has none answers a prompt of one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dlora.data.stops import until_stop
from dlora.errors import UsageError
from dlora.objectives.own_length import depends_on_length
from dlora.runtime.ranks import Ranks
from dlora.tasks.generation import generated_tokens, is_writer, learned_positions

Tokens = list[int]
Stopping = Callable[[int], Any]


def answers_to(
    model: Any,
    prompts: Sequence[Tokens],
    *,
    pad_id: int,
    stops: Sequence[int],
    most: int,
    rows: int,
    ranks: Ranks,
    stopping: Stopping | None = None,
) -> list[Tokens]:
    """The tokens of each answer, without what ends it; collective, the same on every rank.

    The model is in eval mode, without gradients.

    Args:
        prompts: token ids.
        stops: tokens that end an answer.
        most: tokens of an answer.
        rows: prompts in a pass.
        stopping: as for `generated_tokens`.

    Raises:
        UsageError: a prompt leaves no position for an answer.
    """
    # A state, or positions that depend on the length, would take padding for a part of the prompt.
    alone = getattr(model, "_is_stateful", False) or depends_on_length(model)
    batches = dealt([len(prompt) for prompt in prompts], 1 if alone else rows)
    turns = -(-len(batches) // ranks.world)
    found = torch.zeros(len(prompts), most, dtype=torch.int32, device=ranks.device)
    for turn in range(turns):
        place = turn * ranks.world + ranks.rank
        numbers = batches[place] if place < len(batches) else []
        group = [prompts[i] for i in numbers] or [[pad_id]]
        left = room_for(model, max(map(len, group)), most)
        made = generated_tokens(
            model, group, pad_id, list(stops), left, together=ranks.world > 1, stopping=stopping
        )
        for number, answer in zip(numbers, made, strict=False):
            ids = torch.tensor(until_stop(answer, stops), dtype=torch.int32)
            found[number, : len(ids)] = ids.to(found) + 1  # 0: there is no token
    if ranks.world > 1:
        dist.all_reduce(found)
    return [[token - 1 for token in row if token] for row in found.tolist()]


def room_for(model: Any, longest: int, most: int) -> int:
    """Tokens of an answer, at most `most`, to a prompt of `longest` tokens.

    Raises:
        UsageError: there is room for none.
    """
    positions = None if is_writer(model) else learned_positions(model)
    if positions is None:
        return most
    if longest >= positions:
        raise UsageError(
            f"a prompt has {longest} tokens, and the model has learned {positions} positions"
        )
    return min(most, positions - longest)


def dealt(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """The numbers of the prompts of each batch: neighbours in length, the longest first."""
    ordered = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [ordered[at : at + rows] for at in range(0, len(ordered), rows)]
