"""What an objective is: a sum over target tokens, for one micro-batch.

A new objective is one file of this folder with a class that has these members. `dlora.registry`
finds it by its `name`. Options that the file declares become a section of that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from dlora.registry import room


class Batch(Protocol):
    """One micro-batch: what the model takes, and targets [rows, tokens], −100 where there is none.

    `positions` [targets, 2] are the (row, token) of those that are there, `lengths` the tokens of
    each row without padding.
    """

    @property
    def inputs(self) -> dict[str, Tensor]: ...

    @property
    def targets(self) -> Tensor: ...

    @property
    def positions(self) -> Tensor: ...

    @property
    def lengths(self) -> Sequence[int]: ...


def figures_of(objective: Any) -> tuple[str, ...]:
    """The names of what an objective reports beside its loss."""
    return getattr(objective, "figures", ())


class Objective(Protocol):
    """What is minimised.

    It may have `figures`, names of what the metrics show beside the loss, with `reported`, each of
    them for the last loss and summed as that is; and `extra_passes`, the passes over W0 without a
    gradient that a loss takes beside the one with.

    Args:
        section: its options; None where its file declares none.
    """

    name: ClassVar[str]  # the value of `train.objective`

    def __init__(self, section: Any) -> None: ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Σ over the batch's target tokens, a scalar with a gradient.

        The run divides by the number of target tokens of all ranks (of pairs, where these are
        trained on). `model(input_ids=…, targets=…)`
        is the summed cross entropy in chunks (with `positions=…` it need not look for them), and
        `model(input_ids=…)` gives all logits. Pass `lengths=batch.lengths` to either: the positions
        of some models depend on them. Called on every rank as often, also for a batch
        without a target. The model may be called more than once, each time for one more pass over
        the base; an auxiliary loss of routers is that of the last call with a gradient.
        """


def objective_of(config: Any) -> Objective:
    """What `train.objective` of a configuration minimises."""
    name = config.train.objective
    made: Objective = room("objectives")[name].load()(getattr(config, name, None))
    return made
