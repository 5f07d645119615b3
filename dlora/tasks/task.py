"""What a task is: everything of a run that depends on what the model is trained to do.

The loop, sharding, the adapters, checkpoints and the plan are the same for all of them:

    record ── sequence ── a batch's inputs ── model(**inputs, targets=…) ── Σ loss
              `encode`    `collate`           `install`                     `evaluate`
"""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dlora.data.collate import Batch
from dlora.data.encode import Example
from dlora.objectives.objective import Objective
from dlora.tasks.generation import generated


class Task(ABC):
    """What the model is trained to do; what a subclass leaves out is that of a language model.

    Attributes:
        name: the value of `train.task`.
        auto_class: transformers' class that makes the model of a base.
        format: the layout of records that it reads; empty: that of `data.format`.
        draws_head: whether a base may lack the head, which is then drawn and trained.
        longest: tokens of a sequence in `data.max_length`.
        evaluated: {what `figures` counts: whether it should be min or max}.
        packs: whether its sequences can share a row; `packed` makes it.
        why_no_packing: why they cannot, where a user of `data.packing: auto` is to be told.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    format: ClassVar[str] = ""
    draws_head: ClassVar[bool] = False
    longest: ClassVar[int] = 1
    packs: ClassVar[bool] = False
    why_no_packing: ClassVar[str] = ""
    evaluated: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init_subclass__(cls, **how: Any) -> None:
        """A subclass with micro-batches of its own packs only if it says how."""
        super().__init_subclass__(**how)
        if "collate" in cls.__dict__ and "packed" not in cls.__dict__:
            cls.packs = False

    def __init__(self, labels: Sequence[str] = ()) -> None:
        """Take the names of the labels, in order, where the task has labels."""
        self.labels = tuple(labels)

    def configure(self, config: Any, pad_id: int | None) -> None:  # noqa: B027 - may do nothing
        """Set on a model's configuration what the task needs of it."""

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Raise a `UsageError` if the model, which may be on the meta device, cannot do it."""

    def head(self, model: Any) -> nn.Module:
        """The module that makes what is scored."""
        head: nn.Module = model.get_output_embeddings()
        return head

    def in_chunks(self, model: nn.Module) -> nn.Module | None:
        """The head, if its loss is computed in chunks, so that nobody sees its whole output."""
        return None

    @abstractmethod
    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """One micro-batch; of no examples, one without a target, which the model takes as well."""

    def packed(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """The same in one row, where the task `packs`."""
        raise NotImplementedError

    @abstractmethod
    def example(self, tokens: int, words: Sequence[int] = (0,)) -> Example:
        """A sequence of so many tokens, these again and again, with as many targets as can be."""

    def whole(self, longest: int) -> int:
        """Tokens of an example, padding included, whose longest row has so many."""
        return longest

    def sizes(self, data: Any) -> Any:
        """Tokens of each example of a data set as they are padded alone, for the plan."""
        return data.lengths

    def install(self, model: nn.Module, device: str | None = None) -> None:
        """Let the model compute `model(**batch.inputs, targets=…, positions=…)` → Σ loss."""
        own_forward = model.forward

        def forward(
            _: Any,
            *args: Any,
            targets: Tensor | None = None,
            positions: Tensor | None = None,
            lengths: Any = None,
            **kwargs: Any,
        ) -> Any:
            found = own_forward(*args, **kwargs)
            return found if targets is None else self.loss(found.logits, targets, positions)

        model.forward = types.MethodType(forward, model)

    def loss(self, logits: Tensor, targets: Tensor, positions: Tensor | None) -> Tensor:
        """Σ cross entropy of a model's own logits, where `install` does not compute it itself."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(Σ loss, counts [K]) of a batch, whose sums over all batches `figures` takes."""
        where = {"positions": batch.positions, "lengths": batch.lengths}
        loss = model(**batch.inputs, targets=batch.targets, **where)
        return loss, torch.zeros(0, device=loss.device)

    def training_loss(
        self, model: nn.Module, batch: Batch, targets: int, objective: Objective
    ) -> Tensor:
        """Σ loss of a batch with so many targets in training, for the plan."""
        unknown: Any = None  # where the targets are
        return objective.loss(model, replace(batch, positions=unknown))

    def reference(self, model: nn.Module) -> str:
        """How the model is compared with a reference: see `dlora.plan.workload.Workload`."""
        return ""

    @property
    def counted(self) -> int:
        """K, how many numbers `evaluate` counts."""
        return 0

    def figures(self, counts: Tensor) -> dict[str, float]:
        """What the counts of a whole data set say, by name; `eval_` is put in front."""
        return {}

    def prompt(self, example: Example) -> list[int]:
        """The tokens of a sequence that a model which writes gets of it."""
        raise NotImplementedError

    def answers(
        self,
        model: nn.Module,
        tokenizer: Any,
        examples: Sequence[Example],
        *,
        pad_id: int,
        ends: Sequence[int] = (),
    ) -> list[tuple[str, str, str]]:
        """(what was asked, what was wanted, what the model answers, greedily) of each example.

        Collective on a sharded base, and the same on every rank.

        Args:
            ends: tokens that end the answers of the data.
        """
        prompts = [self.prompt(example) for example in examples]
        return generated(model, tokenizer, examples, prompts, pad_id=pad_id, ends=ends)
