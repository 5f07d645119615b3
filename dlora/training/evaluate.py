"""Evaluates a model between steps: held-out loss, and answers to a few held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from dlora.runtime.console import console
from dlora.training.context import RunContext
from dlora.training.record import record_samples

_ROWS = 4  # of an evaluation's pass for each of a micro-batch


@contextmanager
def evaluating(context: RunContext, micro_batches: int = 1) -> Iterator[None]:
    """Without gradients, in eval mode; W0 stays gathered where a pass of so many micro-batches
    leaves it room, and is freed at the end."""
    model, engine = context.model, context.replica.engine
    spares = context.residents.plan.memory.spares_whole(micro_batches)
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


def held_out(context: RunContext) -> dict[str, float]:
    """`eval_loss`, Σ cross entropy / Σ targets over all held-out sequences, and the task's figures.

    The same on every rank.

    Sums are reduced, then divided: a mean of the ranks' means would weigh tokens unequally. A pass
    may gather all of W0, so it takes more sequences than one in training, for which memory is
    planned: it keeps nothing for backward. Where training keeps little either, it takes as many.
    """
    ranks, dataset, model = context.ranks, context.prepared.eval, context.model
    assert dataset is not None
    task = context.prepared.task
    sums = torch.zeros(2 + task.counted, dtype=torch.float64, device=ranks.device)
    micro_batches = 1 if context.prepared.budget.workload.checkpointing else _ROWS
    deal = context.prepared.dealing.times(micro_batches)
    dealt = deal(range(len(dataset)), dataset.lengths, ranks.world)
    with evaluating(context, micro_batches):
        for ids in dealt[ranks.rank]:
            batch = context.prepared.collate([dataset[i] for i in ids]).to(ranks.device)
            loss, counts = task.evaluate(model, batch)
            sums[0] += loss
            sums[1] += batch.num_targets
            sums[2:] += counts
    if ranks.world > 1:
        dist.all_reduce(sums)
    figures = {"loss": float(sums[0] / sums[1]), **task.figures(sums[2:])}
    return {f"eval_{name}": value for name, value in figures.items()}


def print_samples(context: RunContext, when: str, of: str = "", step: int = 0) -> None:
    """Print and record answers to `output.samples` held-out prompts, or to prompts of the training
    data.

    Args:
        when: `before training` or `after training`.
        of: the adapter, among others.
        step: optimizer steps that are done.
    """
    prepared, count = context.prepared, context.config.output.samples
    if count == 0:
        return
    with evaluating(context, -(-count // context.config.train.micro_batch_size)):
        answers = prepared.task.answers(
            context.model,
            prepared.tokenizer,
            (prepared.eval or prepared.train).first(count),
            pad_id=prepared.pad_id,
            ends=prepared.train.report.ends,
        )
    record_samples(context, step, when, answers)
    label = f"{of}, {when}" if of else when
    for prompt, reference, answer in answers:
        console.info(f"--- sample, {label}\n{prompt}\n  wanted: {reference}\n  answer: {answer}")
