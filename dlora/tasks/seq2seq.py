"""Sequence to sequence: an encoder reads a text, and a decoder writes another.

In the data set the two stand behind each other, and the targets are all of the second:

    ids     s0   s1   s2   </s>  t0  t1  </s>        encoder: s0 s1 s2 </s>
    labels  -100 -100 -100 -100  t0  t1  </s>        decoder: <start> t0 t1 → t0 t1 </s>
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from dlora.data.collate import Batch, padded
from dlora.data.encode import NO_TARGET, Example
from dlora.errors import UsageError
from dlora.objectives.chunked_loss import at_least_float32
from dlora.tasks.task import Task


class Seq2Seq(Task):
    """An encoder-decoder model with an output head."""

    name = "seq2seq"
    auto_class = "AutoModelForSeq2SeqLM"
    format = "labelled"
    longest = 2

    _start = 0  # the token that a decoder begins with

    def configure(self, config: Any, pad_id: int | None) -> None:
        """Find the token that a decoder starts with."""
        text = config.get_text_config(decoder=True)
        candidates = (
            getattr(config, "decoder_start_token_id", None),
            getattr(text, "decoder_start_token_id", None),
            getattr(text, "bos_token_id", None),
        )
        start = next((token for token in candidates if token is not None), None)
        if start is None:
            raise UsageError("model.path: its configuration has no decoder_start_token_id")
        self._start = int(start)

    def check(self, model: nn.Module) -> None:
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise UsageError(f"train.task: {type(model).__name__} has no encoder and decoder")

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """Sources [B, S] with their mask, what the decoder reads [B, T], and its targets [B, T]."""
        pairs = [_parts(example) for example in examples] or [
            (np.full(1, pad_id, np.int32), np.full(1, NO_TARGET, np.int32))
        ]
        sources, answers = zip(*pairs, strict=True)
        targets = padded(answers, NO_TARGET)
        read = targets.roll(1, dims=1)
        read[:, 0] = self._start
        read[read == NO_TARGET] = pad_id
        mask = padded([np.ones_like(source) for source in sources], 0)
        positions = (targets != NO_TARGET).nonzero()
        return Batch(
            input_ids=padded(sources, pad_id),
            targets=targets,
            positions=positions,
            ids=[example.id for example in examples],
            # Dropout keeps encoder and decoder apart by layer, and both have so many tokens.
            lengths=[min(map(len, pair)) for pair in pairs] if examples else [],
            num_targets=len(positions),
            extra={"attention_mask": mask, "decoder_input_ids": read},
        )

    def example(self, tokens: int, words: Sequence[int] = (0,)) -> Example:
        """Half of the tokens are read, the others written."""
        ids = np.resize(np.asarray(words, np.int32), max(tokens, 2))
        labels = ids.copy()
        labels[: len(ids) // 2] = NO_TARGET
        return Example(0, ids, labels)

    def loss(self, logits: Tensor, targets: Tensor, positions: Tensor | None) -> Tensor:
        found = (targets != NO_TARGET).nonzero() if positions is None else positions
        z = at_least_float32(logits[tuple(found.T)])
        return F.cross_entropy(z, targets[tuple(found.T)], reduction="sum")

    def prompt(self, example: Example) -> list[int]:
        source: list[int] = _parts(example)[0].tolist()
        return source


def _parts(example: Example) -> tuple[Any, Any]:
    """(source, target) of a sequence, which begins with the first label."""
    split = int((example.labels != NO_TARGET).argmax())
    return example.input_ids[:split], example.labels[split:]
