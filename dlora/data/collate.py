"""From examples to the tensors of one forward. B: sequences; S: the longest one's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlora.data.encode import NO_TARGET, Example


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, padded on the right.

    input_ids: [B, S] int64.
    attention_mask: [B, S] int64, 1 for tokens and 0 for padding; None when nothing is padded.
    targets: [B, S] int64; targets[b, t] is the id that position t must predict (labels shifted left
        by one), -100 where there is no loss.
    ids, lengths: the sequences' ids in the data set and their tokens without padding.
    num_targets: targets that are not -100.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    targets: Tensor
    ids: list[int]
    lengths: list[int]
    num_targets: int


def collate(examples: Sequence[Example], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Pads the examples to one length and shifts their labels.

    No examples give a batch of 1 x 2 padding tokens without targets: a rank that runs short passes
    it through the model, because its peers gather W0 together with it.
    """
    lengths = [len(example) for example in examples]
    rows, longest = max(1, len(examples)), max(lengths, default=2)
    input_ids = torch.full((rows, longest), pad_id, dtype=torch.int64)
    targets = torch.full((rows, longest), NO_TARGET, dtype=torch.int64)
    mask = torch.zeros((rows, longest), dtype=torch.int64)
    for row, example in enumerate(examples):
        length = lengths[row]
        # Copied: an example is a read-only view, which torch.from_numpy does not take.
        input_ids[row, :length] = torch.tensor(example.input_ids, dtype=torch.int64)
        targets[row, : length - 1] = torch.tensor(example.labels[1:], dtype=torch.int64)
        mask[row, :length] = 1
    padded = any(length < longest for length in lengths)
    return Batch(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device) if padded else None,
        targets=targets.to(device),
        ids=[example.id for example in examples],
        lengths=lengths,
        num_targets=int((targets != NO_TARGET).sum()),
    )
