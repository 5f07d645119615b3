"""AdaLoRA's budget: how many triplets may stay at each step, and which ones they are.

    t ≤ tinit               b₀: warm-up, nothing is pruned
    tinit < t ≤ T − tfinal  b_T + (b₀ − b_T)·(1 − (t − tinit)/(T − tinit − tfinal))³, rounded down
    t > T − tfinal          b_T: what is left is trained on

t is the number of optimizer steps made, 1 after the first. A mask falls after every step of the
middle phase that deltaT divides, and after its last one. The paper's equation 14 prints t − tinit −
tfinal for t − tinit, which is not b₀ at its beginning; the authors' code has the formula above.

Source: Zhang et al. 2023, https://arxiv.org/abs/2303.10512, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlora.errors import UsageError

BUDGET_UNITS = ("triplets", "params")


@dataclass(frozen=True)
class BudgetSchedule:
    """The budget as a function of the step, in exact integers.

    Args:
        initial, final: b₀ and b_T.
        total_step: T.

    Raises:
        UsageError: the phases leave no step in which a mask could fall.
    """

    initial: int
    final: int
    total_step: int
    tinit: int
    tfinal: int
    deltaT: int  # noqa: N815 - PEFT's name

    def __post_init__(self) -> None:
        pruning = self.total_step - self.tinit - self.tfinal
        if pruning < 1:
            raise UsageError(
                f"tinit: {self.tinit} steps before pruning and {self.tfinal} after it (tfinal) "
                f"leave no step to prune in, of the run's {self.total_step}"
            )
        if self.deltaT > pruning:
            raise UsageError(
                f"deltaT: {self.deltaT} is more than the {pruning} steps in which ranks are pruned "
                f"(the run's {self.total_step} without tinit and tfinal)"
            )

    @property
    def last(self) -> int:
        """The step after which the last mask falls."""
        return self.total_step - self.tfinal

    def budget(self, t: int) -> int:
        """b(t): the triplets (or parameters) that may stay after step t."""
        if t <= self.tinit:
            return self.initial
        if t >= self.last:
            return self.final
        length, left = self.last - self.tinit, self.last - t
        return self.final + (self.initial - self.final) * left**3 // length**3

    def masks(self, t: int) -> bool:
        """Whether a mask falls after step t."""
        return self.tinit < t <= self.last and (t % self.deltaT == 0 or t == self.last)

    def scores(self, t: int) -> bool:
        """Whether step t enters the averages: the last mask is made of those before it."""
        return t < self.last


def best(scores: Tensor, budget: int, costs: Sequence[int] | None = None) -> Tensor:
    """The triplets that stay, a bool mask on the CPU: the best whose costs fit the budget.

    In the order of score, and of place where scores are equal, each is taken that still fits. With
    a cost of 1 for each these are the `budget` best, so their number is exact whatever ties there
    are.

    Args:
        scores: [triplets], in an order that is the same on every rank.
        costs: of each; None for 1.
    """
    order = torch.sort(scores.cpu(), descending=True, stable=True).indices
    keep = torch.zeros(len(order), dtype=torch.bool)
    if costs is None:
        keep[order[:budget]] = True
        return keep
    left = budget
    for place in order.tolist():
        if costs[place] <= left:
            keep[place], left = True, left - costs[place]
    return keep
