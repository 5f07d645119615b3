"""Classification: one label for a whole sequence.

    loss = −Σ_b log softmax(z_b)[y_b]        z = model(text_b) [C], y_b the label's place in 0 … C−1

In the data set a label stands at the last token of its sequence. The head is trained whole beside
the adapters and saved with them, as PEFT does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlora.base.model_class import set_labels
from dlora.data.collate import Batch, collate, padded
from dlora.data.encode import NO_TARGET, Example
from dlora.errors import UsageError
from dlora.objectives.chunked_loss import at_least_float32
from dlora.tasks.task import Task


class Classification(Task):
    """A model of transformers' sequence classification; C ≥ 2 labels, one of them for a text."""

    name = "classification"
    auto_class = "AutoModelForSequenceClassification"
    format = "labelled"
    draws_head = True

    def configure(self, config: Any, pad_id: int | None) -> None:
        """Set the labels, and the padding by which a decoder finds a sequence's last token."""
        set_labels(config, self.labels)
        config.problem_type = "single_label_classification"
        text = config.get_text_config()
        if getattr(text, "pad_token_id", None) is None:
            text.pad_token_id = pad_id

    def check(self, model: nn.Module) -> None:
        if getattr(model, "num_labels", None) != len(self.labels):
            raise UsageError(
                f"train.task: {type(model).__name__} takes no number of labels, so it cannot be "
                "trained to classify"
            )

    def head(self, model: Any) -> nn.Module:
        return [child for child in model.children() if any(True for _ in child.parameters())][-1]

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """Texts [B, S] with their mask; targets [B], the label of each."""
        plain = collate(examples, pad_id)
        lengths = plain.lengths or [plain.input_ids.shape[1]]  # an empty row attends to itself
        mask = padded([np.ones(length, np.int32) for length in lengths], 0)
        labels = [int(example.labels[-1]) for example in examples] or [NO_TARGET]
        targets = torch.tensor(labels)
        return Batch(
            input_ids=plain.input_ids,
            targets=targets,
            positions=(targets != NO_TARGET).nonzero(),
            ids=plain.ids,
            lengths=plain.lengths,
            num_targets=len(examples),
            extra={"attention_mask": mask},
        )

    def example(self, tokens: int, words: Sequence[int] = (0,)) -> Example:
        ids = np.resize(np.asarray(words, np.int32), tokens)
        labels = np.full_like(ids, NO_TARGET)
        labels[-1] = 0
        return Example(0, ids, labels)

    def loss(self, logits: Tensor, targets: Tensor, positions: Tensor | None) -> Tensor:
        z = at_least_float32(logits)
        return F.cross_entropy(z, targets, reduction="sum", ignore_index=NO_TARGET)

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The counts are the confusion matrix, flattened: [C · C], by wanted and found label."""
        logits, wanted = model(**batch.inputs).logits, batch.targets
        number, known = len(self.labels), wanted != NO_TARGET
        pairs = wanted[known] * number + logits.argmax(-1)[known]
        return self.loss(logits, wanted, None), torch.bincount(pairs, minlength=number**2)

    @property
    def counted(self) -> int:
        return len(self.labels) ** 2

    def figures(self, counts: Tensor) -> dict[str, float]:
        """`accuracy`, and `f1`: the mean over the labels that occur of their F1.

        F1 = 2·right / (wanted + found), each a number of texts.
        """
        table = counts.double().view(len(self.labels), -1)
        right, all_of = table.diagonal(), table.sum(0) + table.sum(1)
        occur = all_of > 0
        f1 = (2 * right[occur] / all_of[occur]).mean()
        return {"accuracy": float(right.sum() / table.sum()), "f1": float(f1)}

    def answers(
        self,
        model: nn.Module,
        tokenizer: Any,
        examples: Sequence[Example],
        *,
        pad_id: int,
        ends: Sequence[int] = (),
    ) -> list[tuple[str, str, str]]:
        batch = self.collate(examples, pad_id).to(next(model.parameters()).device)
        found = model(**batch.inputs).logits.argmax(-1).tolist()
        return [
            (
                tokenizer.decode(example.input_ids, skip_special_tokens=True).strip(),
                self.labels[int(example.labels[-1])],
                self.labels[label],
            )
            for example, label in zip(examples, found, strict=True)
        ]
