"""Causal language modelling: every target token is predicted from the tokens before it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from dlora.data.collate import Batch, collate, packed
from dlora.data.encode import NO_TARGET, Example
from dlora.objectives import chunked_loss
from dlora.objectives.output_head import output_head
from dlora.objectives.own_length import check_scalings
from dlora.objectives.router_loss import find_router_loss
from dlora.tasks.task import Task


class Causal(Task):
    """A decoder with an output head; its loss is computed in chunks."""

    name = "causal"
    auto_class = "AutoModelForCausalLM"
    packs = True

    def check(self, model: nn.Module) -> None:
        """Check that the loss of each sequence can be computed as it is alone."""
        output_head(model)
        check_scalings(model)
        find_router_loss(model)

    def in_chunks(self, model: nn.Module) -> nn.Module | None:
        found = output_head(model)
        return None if found.finish is None else found.module

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        return collate(examples, pad_id)

    def packed(self, examples: Sequence[Example], pad_id: int) -> Batch:
        return packed(examples, pad_id)

    def example(self, tokens: int, words: Sequence[int] = (0,)) -> Example:
        ids = np.resize(np.asarray(words, np.int32), tokens)
        return Example(0, ids, ids)

    def install(self, model: nn.Module, device: str | None = None) -> None:
        chunked_loss.install(model, device)

    def prompt(self, example: Example) -> list[int]:
        """What comes before the first target."""
        before: list[int] = example.input_ids[
            : int((example.labels != NO_TARGET).argmax())
        ].tolist()
        return before
