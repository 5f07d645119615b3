"""Texts that a model samples: with transformers' probabilities, whatever else is in the batch."""

from typing import Any

import pytest
import torch
from tiny import whole

from dlora.tasks.sampling import sample

TEXTS, FIRST = 6000, 7


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tokens_have_the_base_s_probabilities(saved_models: Any, name: str) -> None:
    """χ² of the second token over the likely ones; it would be ±3 standard deviations at 0.3 %."""
    model = whole(saved_models(name)).eval()
    with torch.no_grad():
        made = sample(model, range(TEXTS), first=FIRST, tokens=1, seed=0)
        p = model(torch.tensor([[FIRST]])).logits[0, -1].double().softmax(-1)
    assert made.shape == (TEXTS, 2) and bool((made[:, 0] == FIRST).all())
    counts = torch.bincount(made[:, 1], minlength=len(p)).double()
    likely = p * TEXTS >= 5
    groups = [(counts[likely], p[likely] * TEXTS)]
    rest = counts[~likely].sum()[None], (p[~likely].sum() * TEXTS)[None]
    observed = torch.cat([groups[0][0], rest[0]])
    expected = torch.cat([groups[0][1], rest[1]])
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(observed) - 1
    assert freedom > 20 and abs(statistic - freedom) < 3 * (2 * freedom) ** 0.5


def test_a_text_depends_on_the_seed_and_its_number_alone(saved_models: Any) -> None:
    model = whole(saved_models("llama")).eval()
    how = {"first": FIRST, "tokens": 9}
    with torch.no_grad():
        together = sample(model, [0, 1, 2, 3], **how, seed=4)
        alone = [sample(model, [number], **how, seed=4) for number in (2, 0)]
        other = sample(model, [0, 1, 2, 3], **how, seed=5)
    assert torch.equal(together[2], alone[0][0]) and torch.equal(together[0], alone[1][0])
    assert together.shape == (4, 10) and len({tuple(row) for row in together.tolist()}) == 4
    assert not torch.equal(together, other)
