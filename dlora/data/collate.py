"""From examples to the tensors of one forward. B: sequences; S: their common padded length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dlora.data.encode import NO_TARGET, Example

PAD_TO = 8  # few distinct shapes: each new one costs kernels of its own


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, padded on the right.

    There is no attention mask: what is causal looks to the left only, where no padding is, and
    padded positions carry no target. So attention takes its causal path, without a mask tensor.

    Attributes:
        input_ids: [B, S] int64.
        targets: [B, S] int64; targets[b, t] is the id that position t must predict (labels shifted
            left by one), -100 where there is no loss.
        positions: [num_targets, 2] int64, the (b, t) with a target, in order.
        ids: the sequences' ids in the data set.
        lengths: their tokens without padding.
        num_targets: targets that are not -100.
    """

    input_ids: Tensor
    targets: Tensor
    positions: Tensor
    ids: list[int]
    lengths: list[int]
    num_targets: int

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device; from pinned memory, nobody waits for the copies."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same in pinned memory."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {name: change(getattr(self, name)) for name in TENSORS}
        return replace(self, **tensors)  # type: ignore[arg-type]


TENSORS = ("input_ids", "targets", "positions")


def collate(examples: Sequence[Example], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Pads the examples to one length, a multiple of 8, and shifts their labels.

    No examples give a batch of 1 x 8 padding tokens without targets: a rank that runs short passes
    it through the model, because its peers gather W0 together with it.
    """
    lengths = [len(example) for example in examples]
    rows, longest = max(1, len(examples)), max(lengths, default=1)
    padded = -(-longest // PAD_TO) * PAD_TO
    input_ids = torch.full((rows, padded), pad_id, dtype=torch.int64)
    targets = torch.full((rows, padded), NO_TARGET, dtype=torch.int64)
    for row, example in enumerate(examples):
        # Copied: an example is a read-only view, which torch.from_numpy does not take.
        input_ids[row, : len(example)] = torch.tensor(example.input_ids, dtype=torch.int64)
        shifted = torch.tensor(example.labels[1:], dtype=torch.int64)
        targets[row, : len(shifted)] = shifted
    positions = (targets != NO_TARGET).nonzero()
    ids = [example.id for example in examples]
    return Batch(input_ids, targets, positions, ids, lengths, len(positions)).to(device)
