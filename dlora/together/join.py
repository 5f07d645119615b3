"""The micro-batches of several adapters as one: one pass of the model for all of them.

    packed    [ a0 a0 a0 a1 a1 | b0 b0 b0 b0 | padding ]      padded    a0 a0 a0 .
                                                                        a1 a1 .  .
                                                                        b0 b0 b0 b0

Each sequence has the position, the row's company and the key of its dropout masks that it has in a
run of its adapter alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dlora.data.collate import Batch, in_eights
from dlora.data.encode import NO_TARGET
from dlora.lora.dropout import DropoutStream, SampleKeys
from dlora.lora.names import attached
from dlora.lora.segments import Segment, Segments
from dlora.lora.shared_batch import only, shared_by
from dlora.objectives.loss_part import LossPart


@dataclass(frozen=True)
class Share:
    """What one adapter has of a joined batch.

    Attributes:
        batch: its own micro-batch, as it would be alone.
        row, token: where the first of its places is.
        tokens: of a row of it, for the keys of dropout; 0: each sequence has a row of its own.
    """

    name: str
    batch: Batch
    row: int
    token: int
    tokens: int

    @property
    def positions(self) -> Tensor:
        """[N, 2], where its targets are."""
        return self.batch.positions + torch.tensor([self.row, self.token])


@dataclass(frozen=True)
class JoinedBatch:
    """One pass of the model.

    Attributes:
        batch: of all.
        positions: of each share's targets, in the order of `shares`; `own` are those places in its
            own batch.
    """

    batch: Batch
    segments: Segments
    shares: list[Share]
    positions: list[Tensor]
    own: list[Tensor]

    def to(self, device: torch.device) -> JoinedBatch:
        """The same on a device; nobody waits for the copies to a GPU."""
        if device.type == "cpu":
            return self
        both = [
            [place.pin_memory().to(device, non_blocking=True) for place in places]
            for places in (self.positions, self.own)
        ]
        return JoinedBatch(self.batch.pinned().to(device), self.segments, self.shares, *both)

    def parts(self, model: nn.Module) -> list[LossPart]:
        """What the loss has to tell apart."""
        streams = {name: attachment.stream for name, attachment in attached(model).items()}
        return [
            LossPart(at, own, part.stop, _head(model, part.name, streams))
            for at, own, part in zip(self.positions, self.own, self.segments.parts, strict=True)
        ]

    @contextmanager
    def computing(self, model: nn.Module, seeds: dict[str, int], step: int) -> Iterator[None]:
        """Inside, `model` computes a forward and a backward of this batch.

        Args:
            seeds: of each adapter's run.
            step: counted from 0.
        """
        streams = {name: attachment.stream for name, attachment in attached(model).items()}
        with ExitStack() as stack:
            for share in self.shares:
                own = share.batch
                keys = SampleKeys(seeds[share.name], step, own.ids, own.lengths, share.tokens)
                stack.enter_context(streams[share.name].keyed(keys))
            stack.enter_context(shared_by(model, self.segments))
            yield


def join(batches: Sequence[tuple[str, Batch]], pad_id: int, *, packs: bool) -> JoinedBatch:
    """Join the micro-batches of a pass; those without sequences are left out, but for the last.

    Args:
        batches: each with the name of its adapter.
        packs: whether sequences share rows.
    """
    filled = [(name, batch) for name, batch in batches if batch.lengths] or [batches[0]]
    return (_one_row if packs else _own_rows)(filled, pad_id)


def _one_row(batches: Sequence[tuple[str, Batch]], pad_id: int) -> JoinedBatch:
    segments, shares, start = [], [], 0
    for name, batch in batches:
        # Without the padding behind them, which a batch of no sequences has alone.
        tokens = sum(batch.lengths) or batch.input_ids.shape[1]
        row = tokens if batch.packed else 0
        segments.append(Segment(name, start, start + tokens))
        shares.append(Share(name, batch, 0, start, row))
        start += tokens
    length = in_eights(start)
    ids, targets = _filled(1, length, pad_id), _filled(1, length, NO_TARGET)
    starts_again = torch.arange(length)[None]
    for segment, share in zip(segments, shares, strict=True):
        place, count = slice(segment.start, segment.stop), segment.stop - segment.start
        ids[0, place] = share.batch.input_ids[0, :count]
        targets[0, place] = share.batch.targets[0, :count]
        own = share.batch.extra.get("position_ids")
        starts_again[0, place] = torch.arange(count) if own is None else own[0, :count]
    starts_again[0, start:] = torch.arange(length - start)
    alone = sum(len(batch.lengths) for _, batch in batches) < 2
    extra = {} if alone else {"position_ids": starts_again}
    return _joined(ids, targets, shares, Segments(tuple(segments), 1, length), extra)


def _own_rows(batches: Sequence[tuple[str, Batch]], pad_id: int) -> JoinedBatch:
    longest = max(batch.input_ids.shape[1] for _, batch in batches)
    rows = sum(len(batch.input_ids) for _, batch in batches)
    ids, targets = _filled(rows, longest, pad_id), _filled(rows, longest, NO_TARGET)
    segments, shares, row = [], [], 0
    for name, batch in batches:
        count, width = batch.input_ids.shape
        ids[row : row + count, :width] = batch.input_ids
        targets[row : row + count, :width] = batch.targets
        segments.append(Segment(name, row * longest, (row + count) * longest))
        shares.append(Share(name, batch, row, 0, 0))
        row += count
    return _joined(ids, targets, shares, Segments(tuple(segments), rows, longest), {})


def _joined(
    ids: Tensor,
    targets: Tensor,
    shares: list[Share],
    segments: Segments,
    extra: dict[str, Tensor],
) -> JoinedBatch:
    positions = [share.positions for share in shares]
    batch = Batch(
        ids,
        targets,
        torch.cat(positions),
        [i for share in shares for i in share.batch.ids],
        [n for share in shares for n in share.batch.lengths],
        sum(share.batch.num_targets for share in shares),
        extra,
    )
    own = [share.batch.positions for share in shares]
    return JoinedBatch(batch, segments, shares, positions, own)


def _filled(rows: int, tokens: int, value: int) -> Tensor:
    return torch.full((rows, tokens), value, dtype=torch.int64)


def _head(
    model: nn.Module, name: str, streams: dict[str, DropoutStream]
) -> Callable[[Tensor], AbstractContextManager[None]]:
    """Around the head's product for rows of one adapter, at places of its own batch."""

    @contextmanager
    def inside(at: Tensor) -> Iterator[None]:
        with only(model, name), streams[name].at(at):
            yield

    return inside
