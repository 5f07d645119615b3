"""The first passes of a compiled run: all graphs are made before the first step, in all modes.

So a run knows before it trains whether its blocks compile, no step waits for a compiler, and ranks
wait for one another while the long limit for loading holds. The passes are of made-up sequences;
each is made without graphs as well, and losses and gradients have to agree. They are thrown away.
Where `train.compile` is `auto`, the largest micro-batch is timed in both ways, and graphs that gain
nothing are left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dlora.data.collate import PAD_TO, Batch
from dlora.errors import UsageError
from dlora.lora.attach import attachment_of
from dlora.lora.dropout import SampleKeys
from dlora.objectives.objective import Objective
from dlora.objectives.router_loss import whole_loss
from dlora.runtime.agreement import gather
from dlora.runtime.console import console
from dlora.training.compile_cache import end_workers, use_cache
from dlora.training.compiled import CompiledBlocks
from dlora.training.context import RunContext
from dlora.training.evaluate import evaluating

_ROWS = 3
# Of a token again and again, rounding to bfloat16 alone moves a loss by per cents.
_TEXT = "It was late in the year, and nobody had seen the two old boats leave at night. "
# How far a loss and its gradients' norm may be from those without graphs, by the base's dtype.
_AGREE = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-6, 1e-6)}
_AGREE_IN_HALF = (1e-2, 1e-1)
_TRIALS, _WORTH = 4, 0.97  # passes of each kind; what those with graphs may take of the others


def start_compiled(context: RunContext, objective: Objective) -> None:
    """Switch the graphs of a run on and make them; says how long it took. Collective.

    Raises:
        UsageError: on every rank: a block does not compile, and `train.compile` is true.
    """
    blocks = context.blocks
    if blocks is None:
        return
    use_cache(context.config.train.compile_cache)
    began = time.perf_counter()
    make_graphs(context, blocks, objective)
    end_workers()
    if dist.is_initialized():
        dist.barrier()  # the limit for loading holds here, and a shorter one for `gather`
    # A run that is resumed goes on as it was.
    if context.config.train.compile == "auto" and context.prepared.resumed is None:
        weigh_graphs(context, blocks, objective)
    failed = [found for found in gather(context.ranks, "compile", blocks.failed) if found]
    if failed:
        blocks.switch(False)
        if context.config.train.compile is True:
            raise UsageError(f"train.compile: true: {failed[0]}; set train.compile: auto or false")
        console.info(f"train.compile: off: {failed[0]}")
        return
    blocks.settled = True
    console.info(
        f"train.compile: {blocks.made} graphs of {len(blocks)} blocks in "
        f"{time.perf_counter() - began:.0f} s"
    )


def make_graphs(context: RunContext, blocks: CompiledBlocks, objective: Objective) -> None:
    """Switch the graphs of a run on and make them, by one pass of each kind. Collective."""
    batches = list(_batches(context))
    plain = [_pass(context, objective, batch) for batch in batches]
    blocks.start()
    bounds = _AGREE.get(context.prepared.base.dtype, _AGREE_IN_HALF)
    for batch, expected in zip(batches, plain, strict=True):
        found = _pass(context, objective, batch)
        for name, a, b, bound in zip(
            ("loss", "gradient norm"), found, expected, bounds, strict=True
        ):
            if not abs(a - b) <= bound * max(abs(b), 1e-6):
                blocks.distrust(f"the {name} of graphs is {a:.7g}, without them {b:.7g}")
    if not blocks.used:
        blocks.distrust("no block of the model is called with a tensor of hidden states alone")


def weigh_graphs(
    context: RunContext,
    blocks: CompiledBlocks,
    objective: Objective,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Leave graphs with which the run's largest micro-batch takes as long as without. Collective.

    Args:
        clock: seconds.
    """
    if any(gather(context.ranks, "compile, before", blocks.failed)):
        return
    batch, seconds = _largest(context), dict[bool, list[float]]({True: [], False: []})
    for on in (True, False) * _TRIALS:
        blocks.switch(on)
        began = clock()
        _step(context, objective, batch)
        seconds[on].append(clock() - began)
    blocks.switch(True)
    share = min(seconds[True]) / min(seconds[False])
    if (slowest := max(gather(context.ranks, "compile, share", share))) > _WORTH:
        blocks.distrust(f"a pass with graphs takes {slowest:.2f} of the time of one without")


def _pass(context: RunContext, objective: Objective, batch: Batch) -> tuple[float, float]:
    """A step, and an evaluation, of one batch: its loss and its gradients' norm."""
    found = _step(context, objective, batch)
    if context.prepared.eval is not None:
        with evaluating(context):
            context.prepared.task.evaluate(context.model, batch)
    context.replica.wire.take()
    return found


def _step(context: RunContext, objective: Objective, batch: Batch) -> tuple[float, float]:
    """Forward and backward of one batch: its loss and its gradients' norm."""
    model, replica = context.model, context.replica
    row = batch.input_ids.shape[1] if batch.packed else 0
    keys = SampleKeys(context.config.train.seed, 0, batch.ids, batch.lengths, row)
    attachment = attachment_of(model)
    with attachment.values.shared(), attachment.stream.keyed(keys):
        loss = whole_loss(model, objective.loss(model, batch), batch.num_targets)[0]
        loss.backward()
    gradients = [p.grad.detach() for p in replica.named.values() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    replica.zero_grad()
    replica.release()
    replica.wire.take()
    return float(loss.detach()), norm


def _batches(context: RunContext) -> Iterator[Batch]:
    """One batch of each kind: a row that several share, or rows of their own and one alone."""
    prepared, device = context.prepared, context.ranks.device
    tokens = _unlike_any_size(context.model)
    words = prepared.tokenizer(_TEXT, add_special_tokens=False)["input_ids"] or [0]
    whole = prepared.task.example(tokens, words)
    if prepared.dealing.packs:
        some = [prepared.task.example(n, words) for n in (tokens // 2 - 1, tokens // 2 + 1)]
        yield prepared.collate([replace(e, id=i) for i, e in enumerate(some)]).to(device)
        return
    for rows in (_ROWS, 1):
        yield prepared.collate([replace(whole, id=i) for i in range(rows)]).to(device)


def _largest(context: RunContext) -> Batch:
    """A batch of the shape of the run's largest."""
    prepared, work = context.prepared, context.prepared.budget.workload
    lengths = work.lengths or (work.tokens,) * work.rows
    some = [prepared.task.example(max(2, n // prepared.task.longest)) for n in lengths]
    batch = prepared.collate([replace(e, id=i) for i, e in enumerate(some)])
    return batch.to(context.ranks.device)


def _unlike_any_size(model: nn.Module) -> int:
    """A number of tokens that is no size in the model: of equal sizes a graph takes one."""
    sizes = {size for parameter in model.parameters() for size in parameter.shape}
    config: Any = getattr(model, "config", None)
    texts = config.get_text_config().to_dict().values() if config is not None else ()
    sizes |= {value for value in texts if isinstance(value, int)}
    sizes |= {size // heads for size in list(sizes) for heads in range(1, 129)}
    return next(n for n in range(5 * PAD_TO, 10**6, PAD_TO) if not {n, _ROWS * n} & sizes)
