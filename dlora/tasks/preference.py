"""Preferences: pairs of answers to a prompt, a better one and a worse one.

An example has both, one after the other; a micro-batch has a row for each. A pair is one sequence
wherever sequences are counted, and what is minimised is a mean over pairs. `train.objective` says
which loss of a pair it is, and brings this task along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dlora.data.collate import in_eights
from dlora.data.encode import NO_TARGET, SECOND, Example, longest_row
from dlora.data.pairs import PairedBatch, collate_pairs, halves
from dlora.errors import UsageError
from dlora.objectives.objective import Objective
from dlora.objectives.preference import Pairwise
from dlora.objectives.reference import adapters_in, install_reference
from dlora.objectives.router_loss import find_router_loss
from dlora.tasks.block_chain import chained_blocks
from dlora.tasks.causal import Causal


class Preference(Causal):
    """A decoder that answers, trained on pairs of answers.

    Attributes:
        objective: the loss of a pair; set before the task is used.
    """

    name = "preference"
    offered = False  # `train.objective` picks it
    packs = False
    why_no_packing = "the answers of a pair have a row each"

    objective: Pairwise
    _chained = False  # whether nothing is computed between the model's blocks

    def check(self, model: nn.Module) -> None:
        super().check(model)
        if find_router_loss(model) is not None:
            raise UsageError(
                "train.objective: the base asks for an auxiliary loss of its routers, which is not "
                "built for preferences; set output_router_logits to false in its config.json"
            )
        self._chained = bool(chained_blocks(model))

    def collate(self, examples: Sequence[Example], pad_id: int) -> PairedBatch:
        return collate_pairs(examples, pad_id)

    def example(self, tokens: int, words: Sequence[int] = (0,)) -> Example:
        """Two sequences of half of the tokens, all of which but the first are targets."""
        half = max(tokens // 2, 2)
        ids = np.resize(np.asarray(words, np.int32), 2 * half)
        labels = ids.copy()
        labels[[0, half]] = NO_TARGET, SECOND
        return Example(0, ids, labels)

    def whole(self, longest: int) -> int:
        return 2 * in_eights(longest)

    def sizes(self, data: Any) -> Any:
        return _Sizes(data, self)

    def install(self, model: nn.Module, device: str | None = None) -> None:
        super().install(model, device)
        if self.objective.compares:
            install_reference(model, self._joined(model))

    def training_loss(
        self, model: nn.Module, batch: Any, targets: int, objective: Objective
    ) -> Tensor:
        rows = len(batch.targets)
        counts = [targets // rows + (row < targets % rows) for row in range(rows)]
        marked = replace(batch, positions=batch.positions[:targets], counts=counts)
        return self.objective.loss(model, marked)  # of a pair

    def reference(self, model: nn.Module) -> str:
        if not self.objective.compares:
            return ""
        return "joined" if self._joined(model) else "apart"

    def _joined(self, model: nn.Module) -> list[nn.Module]:
        """The blocks, if adapters lie in them and in the head alone; or none."""
        blocks = chained_blocks(model, known=True) if self._chained else []
        inside = {module for block in blocks for module in block.modules()}
        head = self.in_chunks(model)  # logits that the class itself makes are one tensor of both
        inside |= set(head.modules()) if head is not None else set()
        return blocks if inside.issuperset(adapters_in(model)) else []

    def evaluate(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The counts are the pairs and the sum over them of each of the objective's figures."""
        loss = self.objective.loss(model, batch)
        sums = [torch.tensor(float(batch.weight), dtype=torch.float64, device=loss.device)]
        sums += [self.objective.reported[name].double() for name in self.objective.figures]
        return loss, torch.stack(sums)

    @property
    def counted(self) -> int:
        return 1 + len(self.objective.figures)

    def figures(self, counts: Tensor) -> dict[str, float]:
        pairs, *sums = counts.tolist()
        return {n: s / pairs for n, s in zip(self.objective.figures, sums, strict=True)}

    def answers(
        self,
        model: nn.Module,
        tokenizer: Any,
        examples: Sequence[Example],
        *,
        pad_id: int,
        ends: Sequence[int] = (),
    ) -> list[tuple[str, str, str]]:
        """What is wanted is the chosen answer."""
        chosen = [halves(example)[0] for example in examples]
        return super().answers(model, tokenizer, chosen, pad_id=pad_id, ends=ends)


class _Sizes:
    """Tokens of a pair with its padding, counted when they are asked for."""

    def __init__(self, data: Any, task: Preference) -> None:
        self._data, self._task = data, task

    def __getitem__(self, index: int) -> int:
        return self._task.whole(longest_row(self._data[index].labels))
