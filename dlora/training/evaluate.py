"""Evaluates a model between steps: held-out loss, and answers to a few held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist

from dlora.data.stops import stop_tokens
from dlora.evaluation.answers import answers_to
from dlora.evaluation.held_out import measure
from dlora.evaluation.inference import inference
from dlora.evaluation.metrics import scores
from dlora.evaluation.references import questions_of
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


def rows_at_once(context: RunContext) -> int:
    """How many micro-batches a pass of an evaluation takes: several, where backward keeps much."""
    return 1 if context.prepared.budget.workload.checkpointing else _ROWS


def held_out(context: RunContext) -> dict[str, float]:
    """`eval_loss`, Σ loss / Σ targets (or pairs) over all held-out sequences, and task's figures.

    The same on every rank. A pass may gather all of W0, so it takes more sequences than one in
    training, for which memory is planned: it keeps nothing for backward. Where training keeps
    little either, it takes as many.
    """
    prepared, model = context.prepared, context.model
    assert prepared.eval is not None
    micro_batches = rows_at_once(context)
    deal = prepared.dealing.times(micro_batches)
    with evaluating(context, micro_batches):
        about = (prepared.task, model, prepared.eval, deal, prepared.collate, context.ranks)
        found = measure(*about)
    return {f"eval_{name}": value for name, value in found.figures.items()}


def before_training(context: RunContext, log: Any, say: Callable[[str], None], of: str) -> None:
    """Print samples, and log an evaluation as step 0.

    Args:
        say: takes the line about the loss.
        of: the adapter, among others.
    """
    print_samples(context, "before training", of)
    if context.eval_every:
        log.write({"step": 0, **(before := evaluate(context))})
        say(f"held-out loss before training: {before['eval_loss']:.4f}")


def evaluate(context: RunContext) -> dict[str, float]:
    """All figures of an evaluation: those of `held_out`, and `output.eval_metrics`."""
    figures = held_out(context)
    if context.config.output.eval_metrics:
        figures |= answer_scores(context)
    return figures


def answer_scores(context: RunContext) -> dict[str, float]:
    """`output.eval_metrics` of greedy answers to the held-out prompts; the same on every rank."""
    prepared, ranks, model = context.prepared, context.ranks, cast(Any, context.model)
    output, tokenizer = context.config.output, prepared.tokenizer
    assert prepared.eval is not None
    micro_batches = rows_at_once(context)
    ends = prepared.train.report.ends
    stops = stop_tokens(tokenizer, model.generation_config.eos_token_id, ends)
    asked = questions_of(prepared.eval, prepared.task, tokenizer, stops, "data.eval")
    asked = asked.first(output.eval_prompts)
    with evaluating(context, micro_batches):
        answers = answers_to(
            model,
            asked.prompts,
            pad_id=prepared.pad_id,
            stops=stops,
            most=output.eval_max_new_tokens,
            rows=context.config.train.micro_batch_size * micro_batches,
            ranks=ranks,
        )
    found = torch.zeros(len(output.eval_metrics), dtype=torch.float64, device=ranks.device)
    if ranks.main:
        texts = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in answers]
        values = scores(output.eval_metrics, texts, asked.references)
        found += torch.tensor(list(values.values()), dtype=torch.float64, device=ranks.device)
    if ranks.world > 1:
        dist.broadcast(found, src=0)
    named = zip(output.eval_metrics, found.tolist(), strict=True)
    return {f"eval_{name}": value for name, value in named}


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
