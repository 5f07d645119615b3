"""Simple preference optimisation: likelihood per token with a margin, no reference.

    r = β·log π(y|x) / T,   ℓ = −log σ(r_w − r_l − γ)                  T: tokens of the answer

Source: Meng et al. 2024, https://arxiv.org/abs/2405.14734.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dlora.objectives.preference import Pairs, Pairwise
from dlora.registry import option


@dataclass(frozen=True)
class SimpoOptions:
    """Scale and margin of the rewards."""

    beta: float = option(2.0, "β: scale of an answer's likelihood per token", gt=0)
    gamma: float = option(1.0, "γ: by how much the better answer's reward is to be higher", ge=0)


class Simpo(Pairwise):
    """The objective `simpo`."""

    name = "simpo"
    task = "preference"
    formats = ("preference",)
    compiles = False
    clashes = (
        ("train.task", "!=", "causal", "which scores the answers of a decoder"),
        ("adapter.init_lora_weights", "==", "lora_ga", "whose start is computed for sft"),
    )

    def losses(self, pairs: Pairs) -> Tensor:
        chosen, rejected = self.rewards(pairs)
        return -F.logsigmoid(chosen - rejected - self.settings.gamma)

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        chosen, rejected = pairs.means
        return self.settings.beta * chosen, self.settings.beta * rejected
