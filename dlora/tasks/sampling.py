"""Texts that a language model samples, the same ones whatever ranks and batches they are made on.

    token = argmax_v (log p_v + g_v)      g: Gumbel noise of (seed, text, place), so that it is a
                                          sample of p, and no other text has a part in it

Source: the Gumbel-max trick, Gumbel 1954.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlora.objectives.own_length import forget_lengths

_NO_TOKEN = 1 << 30  # for an end that no logit stands for: so all ranks make as many passes


def sample(model: Any, numbers: Sequence[int], *, first: int, tokens: int, seed: int) -> Tensor:
    """[texts, 1 + tokens]: `first`, and as many sampled tokens of each text, whatever they are.

    Collective on a sharded base: ranks take turns with W0 together, so each has as many calls. The
    model is in eval mode, without gradients.

    Args:
        numbers: of the texts, which with the seed decide what is drawn.
        first: the token that each begins with.
    """
    forget_lengths(model)
    device = next(model.parameters()).device
    begun = torch.full((len(numbers), 1), first, device=device)
    made: Tensor = model.generate(
        input_ids=begun,
        attention_mask=torch.ones_like(begun),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=first,
        eos_token_id=_NO_TOKEN,
        logits_processor=[_Gumbel(numbers, seed)],
    )
    return made


class _Gumbel:
    """Adds the noise of each text to its logits, for which transformers then takes the argmax."""

    def __init__(self, numbers: Sequence[int], seed: int) -> None:
        self._numbers, self._seed = numbers, seed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [texts, V] of the next token of `input_ids` [texts, tokens so far]."""
        place, width = input_ids.shape[1], scores.shape[1]
        noise = [
            np.random.default_rng([self._seed, number, place]).gumbel(size=width).astype(np.float32)
            for number in self._numbers
        ]
        return scores.float() + torch.from_numpy(np.stack(noise)).to(scores.device)
