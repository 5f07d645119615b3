"""From examples to the tensors of one forward. B: sequences; S: their common padded length.

padded                      packed: one row, B = 1, whose positions start again

a0 a1 a2 a3 | a4 a5 .  .    a0 a1 a2 a3 a4 a5 b0 b1 b2 .  .  .
b0 b1 b2 .  | .  .  .  .
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from dlora.data.encode import NO_TARGET, Example, Int32Array

PAD_TO = 8  # few distinct shapes: each new one costs kernels of its own


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, padded on the right.

    There is no attention mask: what is causal looks to the left only, where no padding is, and
    padded positions carry no target. So attention takes its causal path, without a mask tensor. Of
    packed sequences the model is told the lengths.

    Attributes:
        input_ids: [B, S] int64.
        targets: [B, S] int64; targets[b, t] is the id that position t must predict (labels shifted
            left by one), -100 where there is no loss.
        positions: [num_targets, 2] int64, the (b, t) with a target, in order.
        ids: the sequences' ids in the data set.
        lengths: their tokens without padding; more of them than rows share one.
        num_targets: targets that are not -100.
        extra: what the model takes beside `input_ids`, by name.
    """

    input_ids: Tensor
    targets: Tensor
    positions: Tensor
    ids: list[int]
    lengths: list[int]
    num_targets: int
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        """Whether several sequences share the one row."""
        return len(self.lengths) > len(self.input_ids)

    @property
    def weight(self) -> int:
        """How much the batch counts in a mean: its targets."""
        return self.num_targets

    @property
    def places(self) -> int:
        """Tokens and padding that the model computes, an encoder's and a decoder's together."""
        read = self.extra.get("decoder_input_ids")
        return self.input_ids.numel() + (0 if read is None else read.numel())

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with, by name."""
        return {"input_ids": self.input_ids, **self.extra}

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device; from pinned memory, nobody waits for the copies."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same in pinned memory."""
        return self.mapped(Tensor.pin_memory)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same with what `change` makes of each tensor."""
        tensors = {name: change(getattr(self, name)) for name in TENSORS}
        extra = {name: change(tensor) for name, tensor in self.extra.items()}
        return replace(self, **tensors, extra=extra)  # type: ignore[arg-type]


TENSORS = ("input_ids", "targets", "positions")


def collate(examples: Sequence[Example], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Pads the examples to one length, a multiple of 8, and shifts their labels.

    No examples give a batch of 1 x 8 padding tokens without targets: a rank that runs short passes
    it through the model, because its peers gather W0 together with it.
    """
    lengths = [len(example) for example in examples]
    input_ids = padded([example.input_ids for example in examples], pad_id)
    shifted = [np.append(example.labels[1:], np.int32(NO_TARGET)) for example in examples]
    targets = padded(shifted, NO_TARGET)
    positions = (targets != NO_TARGET).nonzero()
    ids = [example.id for example in examples]
    return Batch(input_ids, targets, positions, ids, lengths, len(positions)).to(device)


def packed(examples: Sequence[Example], pad_id: int) -> Batch:
    """Puts the examples side by side into one row, whose length is a multiple of 8.

    Labels are shifted within each, and positions start again.

    No examples, or one, give the batch of `collate`: there is nothing to share.
    """
    if len(examples) < 2:
        return collate(examples, pad_id)
    lengths = [len(example) for example in examples]
    shifted = [np.append(example.labels[1:], np.int32(NO_TARGET)) for example in examples]
    input_ids = padded([np.concatenate([example.input_ids for example in examples])], pad_id)
    targets = padded([np.concatenate(shifted)], NO_TARGET)
    behind = input_ids.shape[1] - sum(lengths)
    starts_again = torch.cat([torch.arange(length) for length in (*lengths, behind)])
    positions = (targets != NO_TARGET).nonzero()
    ids = [example.id for example in examples]
    extra = {"position_ids": starts_again[None]}
    return Batch(input_ids, targets, positions, ids, lengths, len(positions), extra)


def in_eights(tokens: int) -> int:
    """The multiple of 8 that so many tokens are padded to."""
    return -(-tokens // PAD_TO) * PAD_TO


def padded(rows: Sequence[Int32Array], value: int) -> Tensor:
    """The rows in one int64 tensor [B, S], S a multiple of 8; at least one row, of `value`s."""
    longest = max(map(len, rows), default=1)
    size = (max(1, len(rows)), in_eights(longest))
    made = torch.full(size, value, dtype=torch.int64)
    for row, values in enumerate(rows):
        # Copied: an example is a read-only view, which torch.from_numpy does not take.
        made[row, : len(values)] = torch.tensor(values, dtype=torch.int64)
    return made
