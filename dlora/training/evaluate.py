"""Evaluates a model between steps: held-out loss, and answers to a few held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dlora.data import NO_TARGET, Example, deal
from dlora.data.collate import collate
from dlora.data.stops import stop_tokens, until_stop
from dlora.objectives.own_length import depends_on_length, forget_lengths
from dlora.runtime.console import console
from dlora.training.checks import learned_positions
from dlora.training.context import RunContext

_ROWS = 4  # of an evaluation's pass for each of a micro-batch


@contextmanager
def evaluating(context: RunContext, micro_batches: int = 1) -> Iterator[None]:
    """Without gradients, in eval mode; W0 stays gathered where a pass of so many micro-batches
    leaves it room, and is freed at the end."""
    model, engine = context.model, context.replica.engine
    spares = context.prepared.budget.memory.spares_whole(micro_batches)
    with inference(model), engine.staying(model) if spares else nullcontext():
        yield
    context.replica.release()
    context.replica.wire.take()  # wire_bytes are those of training


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Without gradients, in eval mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def held_out_loss(context: RunContext) -> float:
    """Σ cross entropy / Σ target tokens over all held-out sequences, the same on every rank.

    Sums are reduced, then divided: a mean of the ranks' means would weigh tokens unequally. A pass
    may gather all of W0, so it takes more sequences than one in training, for which memory is
    planned: it keeps nothing for backward. Where training keeps little either, it takes as many.
    """
    ranks, dataset, model = context.ranks, context.prepared.eval, context.model
    assert dataset is not None
    loss, tokens = torch.zeros((), dtype=torch.float64, device=ranks.device), 0
    micro_batches = 1 if context.prepared.budget.workload.checkpointing else _ROWS
    size = context.config.train.micro_batch_size * micro_batches
    dealt = deal(range(len(dataset)), dataset.lengths, ranks.world, size)
    with evaluating(context, micro_batches):
        for ids in dealt[ranks.rank]:
            batch = collate([dataset[i] for i in ids], context.prepared.pad_id, ranks.device)
            rows = {"input_ids": batch.input_ids, "targets": batch.targets}
            loss += model(**rows, positions=batch.positions, lengths=batch.lengths)
            tokens += batch.num_targets
    sums = torch.stack([loss, torch.full_like(loss, tokens)])
    if ranks.world > 1:
        dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def print_samples(context: RunContext, when: str) -> None:
    """Print answers to `output.samples` held-out prompts, or to prompts of the training data."""
    prepared, count = context.prepared, context.config.output.samples
    if count == 0:
        return
    with evaluating(context, -(-count // context.config.train.micro_batch_size)):
        answers = sample_answers(
            context.model,
            prepared.tokenizer,
            (prepared.eval or prepared.train).first(count),
            pad_id=prepared.pad_id,
            ends=prepared.train.report.ends,
        )
    for prompt, reference, answer in answers:
        console.info(f"--- sample, {when}\n{prompt}\n  wanted: {reference}\n  answer: {answer}")


def sample_answers(
    model: Any,
    tokenizer: Any,
    examples: list[Example],
    *,
    pad_id: int,
    ends: Sequence[int] = (),
    max_new_tokens: int = 24,
) -> list[tuple[str, str, str]]:
    """(prompt, reference, answer) of examples, decoded greedily.

    Args:
        ends: tokens that end the answers of the data, where an answer then ends as well.

    Collective on a sharded base: every rank generates the same tokens, so that gathers match. The
    model is in eval mode, without gradients.
    """
    starts = [int((example.labels != NO_TARGET).argmax()) for example in examples]
    prompts = [example.input_ids[:s].tolist() for example, s in zip(examples, starts, strict=True)]
    longest = max(map(len, prompts))
    if (positions := learned_positions(model)) is not None:
        max_new_tokens = min(max_new_tokens, positions - longest)
    stops = stop_tokens(tokenizer, model.generation_config.eos_token_id, ends)

    def plain(tokens: list[int]) -> str:
        return tokenizer.decode(until_stop(tokens, stops), skip_special_tokens=True).strip()

    # A state, or positions that depend on the length, would take padding for a part of the prompt.
    alone = getattr(model, "_is_stateful", False) or depends_on_length(model)
    answers = [
        answer
        for group in ([[prompt] for prompt in prompts] if alone else [prompts])
        for answer in _answers(model, group, pad_id, stops, max_new_tokens)
    ]
    return [
        (
            tokenizer.decode(prompt, skip_special_tokens=True).strip(),
            plain([t for t in example.labels.tolist() if t != NO_TARGET]),
            plain(answer),
        )
        for prompt, example, answer in zip(prompts, examples, answers, strict=True)
    ]


def _answers(
    model: Any, prompts: list[list[int]], pad_id: int, stops: list[int], max_new_tokens: int
) -> list[list[int]]:
    """What the model says to prompts, padded on the left to one length; each up to `stops`."""
    forget_lengths(model)
    longest = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    generated = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_id,
        eos_token_id=stops or None,
    )
    answers: list[list[int]] = generated[:, longest:].tolist()
    return answers
