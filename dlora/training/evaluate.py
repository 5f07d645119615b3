"""Looking at a model between steps: held-out loss, and answers to a few held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dlora.data import NO_TARGET, Dataset, deal
from dlora.data.collate import collate
from dlora.training.checks import learned_positions


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


def held_out_loss(
    model: nn.Module, dataset: Dataset, *, pad_id: int, micro_batch_size: int, rank: int, world: int
) -> float:
    """Σ cross entropy / Σ target tokens over all of `dataset`, the same on every rank.

    Sums are reduced, then divided: a mean of the ranks' means would weigh tokens unequally.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64)
    dealt = deal(range(len(dataset)), dataset.lengths, world, micro_batch_size)
    with inference(model):
        for ids in dealt[rank]:
            batch = collate([dataset[i] for i in ids], pad_id, device)
            loss = model(input_ids=batch.input_ids, targets=batch.targets)
            sums += torch.tensor([float(loss), float(batch.num_targets)], dtype=torch.float64)
    if world > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def sample_answers(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    *,
    count: int,
    pad_id: int,
    max_new_tokens: int = 40,
) -> list[tuple[str, str, str]]:
    """(prompt, reference, answer) of the first `count` examples, decoded greedily.

    Collective on a sharded base: every rank generates the same tokens, so that gathers match.
    """
    examples = [dataset[i] for i in range(min(count, len(dataset)))]
    starts = [int((example.labels != NO_TARGET).argmax()) for example in examples]
    prompts = [example.input_ids[:s].tolist() for example, s in zip(examples, starts, strict=True)]
    longest = max(map(len, prompts))
    if (positions := learned_positions(model)) is not None:
        max_new_tokens = min(max_new_tokens, positions - longest)
    device = next(model.parameters()).device
    ids = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    with inference(model):
        generated = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad_id,
        )
    answers = tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
    return [
        (
            tokenizer.decode(prompt, skip_special_tokens=True).strip(),
            tokenizer.decode(
                [t for t in example.labels.tolist() if t != NO_TARGET], skip_special_tokens=True
            ).strip(),
            answer.strip(),
        )
        for prompt, example, answer in zip(prompts, examples, answers, strict=True)
    ]
