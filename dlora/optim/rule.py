"""What an optimizer is to a run. A new one is one file of this folder with a class like these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch.optim import Optimizer

Groups = list[dict[str, Any]]


class Rule(Protocol):
    """How A and B are updated.

    Attributes:
        name: the value of `optimizer.name`.
        moments: values kept of each element, for the plan.
        divides: what `sharding.optimizer_state: divided` distributes over ranks.
    """

    name: ClassVar[str]
    moments: ClassVar[int]
    divides: ClassVar[Literal["elements", "pairs", "nothing"]]

    @staticmethod
    def build(
        groups: Groups,
        pairs: Sequence[Any],
        section: Any,
        device: torch.device,
        say: Callable[[str], None],
    ) -> Optimizer:
        """The optimizer of these groups.

        Args:
            groups: as of any torch optimizer, with lr and weight decay.
            pairs: A and B of every adapter, with its scale, for a rule that divides by pairs.
            section: the `optimizer` section, with the options of the rule's file.
            say: prints a line on rank 0.
        """
