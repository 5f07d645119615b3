"""Where a teacher's logits come from: the model's own W0, another model, or files.

    loss_at(logits or likeliest tokens of the teacher, head of the model) → Σ loss

The teacher passes without gradients, and only what its head gets at the targets, [N, H], is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dlora.lora.names import names_of
from dlora.lora.saved_modules import ModulesToSaveCopy
from dlora.lora.several import is_adapted
from dlora.lora.states import switched_off
from dlora.lora.variants import LoraAdapter
from dlora.objectives.head_input import HeadInput, at_head
from dlora.objectives.objective import Batch


@dataclass(frozen=True)
class TopK:
    """The likeliest tokens of each target of a batch, in the order of its targets.

    Attributes:
        ids: int64 [N, k].
        log_p: float32 [N, k] of softmax(logits/T), never increasing along k.
    """

    ids: Tensor
    log_p: Tensor


Logits = Callable[[slice], Tensor]  # [chunk, V] of the targets that these are
LossAt = Callable[[Logits | TopK, HeadInput], Tensor]  # (of the teacher, head of the model) → loss


class Teacher(Protocol):
    """Where a teacher's logits come from."""

    def loss(self, model: nn.Module, batch: Batch, loss_at: LossAt) -> Tensor:
        """`loss_at` the head of `model`, with what the teacher says there."""

    def teach(self, model: nn.Module, batch: Batch, take: Callable[[HeadInput], Tensor]) -> Tensor:
        """A pass of the teacher alone; what `take` makes at its head."""


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base.

    As `dlora.lora.attach.disabled`, of a model whose record may name more blocks than it has: that
    of a plan's trace.
    """
    children = [m for m in model.modules() if isinstance(m, LoraAdapter | ModulesToSaveCopy)]
    with switched_off(children):
        yield


@contextmanager
def with_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, the model computes with the adapter of a name alone."""
    names = names_of(model)
    before, names.active = names.active, [name]
    try:
        yield
    finally:
        names.active = before


class OwnBase:
    """The model's own W0 is the teacher: one pass more over it, without gradients.

    Args:
        acting: context in which a model computes as the teacher.
    """

    def __init__(
        self, acting: Callable[[nn.Module], AbstractContextManager[None]] = without_adapters
    ) -> None:
        self._acting = acting

    def loss(self, model: nn.Module, batch: Batch, loss_at: LossAt) -> Tensor:
        rows = self.teach(model, batch, HeadInput.rows)

        def at_own_head(head: HeadInput) -> Tensor:
            def plain(piece: slice) -> Tensor:
                with torch.no_grad():
                    return head.logits(rows[piece])

            def as_teacher(piece: slice) -> Tensor:
                with self._acting(model):
                    return plain(piece)

            return loss_at(as_teacher if is_adapted(head.head.module) else plain, head)

        return at_head(model, batch, at_own_head)

    def teach(self, model: nn.Module, batch: Batch, take: Callable[[HeadInput], Tensor]) -> Tensor:
        with torch.no_grad(), self._acting(model):
            return at_head(model, batch, take)


class OtherBase:
    """Another model is the teacher, sharded like the student.

    The student runs inside the teacher's head, so that the heads of both are gathered for the loss
    and nothing else of the teacher is alive while the student saves its activations.

    Args:
        teacher: frozen and in eval mode, with `chunked_loss` installed.
    """

    def __init__(self, teacher: nn.Module) -> None:
        self._teacher = teacher

    def loss(self, model: nn.Module, batch: Batch, loss_at: LossAt) -> Tensor:
        def at_teachers_head(teacher: HeadInput) -> Tensor:
            rows = teacher.rows()

            def logits(piece: slice) -> Tensor:
                with torch.no_grad():
                    return teacher.logits(rows[piece])

            with torch.enable_grad():
                return at_head(model, batch, lambda head: loss_at(logits, head))

        return self.teach(model, batch, at_teachers_head)

    def teach(self, model: nn.Module, batch: Batch, take: Callable[[HeadInput], Tensor]) -> Tensor:
        with torch.no_grad():
            return at_head(self._teacher, batch, take)


class Written:
    """The teacher is a file: what was its likeliest in each sequence (`dlora teach`).

    Args:
        read: the tokens of a batch's sequences, in the order of their targets.
    """

    def __init__(self, read: Callable[[Any], TopK]) -> None:
        self._read = read

    def loss(self, model: nn.Module, batch: Batch, loss_at: LossAt) -> Tensor:
        likeliest = self._read(batch)
        return at_head(model, batch, lambda head: loss_at(likeliest, head))

    def teach(self, model: nn.Module, batch: Batch, take: Callable[[HeadInput], Tensor]) -> Tensor:
        raise TypeError("a file has no logits")
