"""Direct preference optimisation: a classifier of pairs whose reward is a ratio of likelihoods.

    r = β·(log π(y|x) − log π_ref(y|x)),   d = r_w − r_l,   ε = label_smoothing
    sigmoid   ℓ = −(1 − ε)·log σ(d) − ε·log σ(−d)                      (ε > 0: cDPO)
    robust    ℓ = (−(1 − ε)·log σ(d) + ε·log σ(−d)) / (1 − 2ε)
    hinge     ℓ = max(0, 1 − d)
    ipo       ℓ = (r_w/(β·T_w) − r_l/(β·T_l) − 1/(2β))²                T: tokens of an answer
    L         = ℓ + sft_weight·(−log π(y_w|x) / T_w) + kl_weight·KL(π_ref ‖ π)

KL is over the whole vocabulary, a mean over the tokens of the chosen answer. At step 0 d = 0, so
sigmoid gives ln 2.

Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; cDPO:
https://ericmitchell.ai/cdpo.pdf; robust: Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409;
hinge (SLiC): https://arxiv.org/abs/2309.06657; IPO: Azar et al. 2023,
https://arxiv.org/abs/2310.12036, per token as its authors and TRL compute it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dlora.objectives.preference import Pairs, Pairwise
from dlora.registry import option


@dataclass(frozen=True)
class DpoOptions:
    """What is minimised, and what the policy is compared with."""

    beta: float = option(0.1, "β: how strongly the policy is held to the reference", gt=0)
    loss_type: Literal["sigmoid", "robust", "hinge", "ipo"] = option(
        "sigmoid", "the loss of a pair; sigmoid with label_smoothing is cDPO"
    )
    label_smoothing: float = option(
        0.0, "ε: share of pairs whose answers are taken to be swapped", ge=0, lt=0.5
    )
    sft_weight: float = option(
        0.0, "weight of the chosen answer's cross entropy, a mean over its tokens", ge=0
    )
    kl_weight: float = option(
        0.0, "weight of KL(reference to policy), a mean over the chosen answer's tokens", ge=0
    )
    reference: Literal["auto", "base", "adapter"] = option(
        "auto",
        "base: W0 with the adapter off; adapter: a frozen copy of the adapter at adapter.path; "
        "auto: the copy where there is such an adapter",
    )


class Dpo(Pairwise):
    """The objective `dpo`."""

    name = "dpo"
    task = "preference"
    formats = ("preference",)
    compiles = False
    compares = True
    clashes = (
        ("train.task", "!=", "causal", "which scores the answers of a decoder"),
        ("adapter.init_lora_weights", "==", "lora_ga", "whose start is computed for sft"),
        ("adapter.method", "==", "mola", "whose routers would be trained by the reference as well"),
    )

    def __init__(self, section: Any) -> None:
        """Take the section `dpo`."""
        super().__init__(section)
        self.through_kl = section.kl_weight > 0

    def losses(self, pairs: Pairs) -> Tensor:
        losses = self._compared(pairs)
        if self.settings.sft_weight:
            losses = losses - self.settings.sft_weight * pairs.means[0]
        if self.settings.kl_weight:
            losses = losses + self.settings.kl_weight * pairs.kl
        return losses

    def _compared(self, pairs: Pairs) -> Tensor:
        beta, smooth = self.settings.beta, self.settings.label_smoothing
        chosen, rejected = pairs.log_ratios
        d = beta * (chosen - rejected)
        if self.settings.loss_type == "hinge":
            return torch.relu(1 - d)
        if self.settings.loss_type == "ipo":
            apart = chosen / pairs.chosen_tokens - rejected / pairs.rejected_tokens
            return (apart - 1 / (2 * beta)) ** 2
        right, swapped = -F.logsigmoid(d), -F.logsigmoid(-d)
        if self.settings.loss_type == "robust":
            return ((1 - smooth) * right - smooth * swapped) / (1 - 2 * smooth)
        return (1 - smooth) * right + smooth * swapped

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        chosen, rejected = pairs.log_ratios
        return self.settings.beta * chosen, self.settings.beta * rejected
