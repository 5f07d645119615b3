"""Odds-ratio preference optimisation: fine-tuning and preferences in one loss, no reference.

    p̄ = exp(log π(y|x) / T),   odds = p̄ / (1 − p̄)                    T: tokens of the answer
    L = −log π(y_w|x) / T_w − λ·log σ(log odds_w − log odds_l)

The reward of an answer is λ·log π(y|x) / T.

Source: Hong et al. 2024, https://arxiv.org/abs/2403.07691.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dlora.objectives.preference import Pairs, Pairwise
from dlora.registry import option


@dataclass(frozen=True)
class OrpoOptions:
    """How much the preference counts beside the chosen answer's cross entropy."""

    lambda_: float = option(0.1, "λ: weight of the odds ratio beside the cross entropy", gt=0)


class Orpo(Pairwise):
    """The objective `orpo`."""

    name = "orpo"
    task = "preference"
    formats = ("preference",)
    compiles = False
    clashes = (
        ("train.task", "!=", "causal", "which scores the answers of a decoder"),
        ("adapter.init_lora_weights", "==", "lora_ga", "whose start is computed for sft"),
    )

    def losses(self, pairs: Pairs) -> Tensor:
        chosen, rejected = pairs.means
        odds = chosen - log1mexp(chosen) - rejected + log1mexp(rejected)
        return -chosen - self.settings.lambda_ * F.logsigmoid(odds)

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        chosen, rejected = pairs.means
        return self.settings.lambda_ * chosen, self.settings.lambda_ * rejected


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) of x < 0, exact near 0 and far from it, and finite at 0."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -0.6931
    # Each branch sees only what it is for: where it overflows, its gradient times zero is no zero.
    first, second = torch.where(near, x, -0.5), torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(first)), torch.log1p(-torch.exp(second)))
