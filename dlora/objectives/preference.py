"""What losses over pairs have in common: a prompt, an answer that is better, and one that is worse.

    s_w, s_l = Σ log π(y_t | x, y_<t) over the tokens of an answer     [B], w chosen, l rejected
    L        = Σ over the B pairs of ℓ(s_w, s_l, …)                    the run divides by the pairs

A micro-batch of B pairs has 2B rows, first the chosen ones. `dpo`, `orpo` and `simpo` say what ℓ is
and what an answer's reward is; log-probabilities, the reference and the figures are here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dlora.lora.layers import CHILD
from dlora.lora.several import is_adapted
from dlora.objectives.chunked_loss import chunk_rows
from dlora.objectives.objective import Batch
from dlora.objectives.output_head import OutputHead
from dlora.objectives.reference import Reference, reference_of
from dlora.objectives.scored_targets import Logits, Targets, TokenScores, scored

FIGURES = ("rewards_chosen", "rewards_rejected", "margin", "accuracy")


class PairBatch(Batch, Protocol):
    """A micro-batch of pairs; `counts` are the targets of each row, first of the chosen ones."""

    @property
    def counts(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Pairs:
    """B pairs, each tensor [B].

    Attributes:
        chosen, rejected: log-probabilities of the answers, in float64.
        reference_chosen, reference_rejected: those of the reference; zeros without one.
        chosen_tokens, rejected_tokens: of the answers.
        kl: KL(π_ref ‖ π), the mean over the tokens of the chosen answer; zeros without a reference.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    kl: Tensor

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """log π − log π_ref of chosen and of rejected answers."""
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Log-probability per token of both."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


class Pairwise(ABC):
    """An objective over pairs.

    Attributes:
        compares: whether there is a reference.
        through_kl: whether the loss depends on `Pairs.kl`.
        reported: figures of the last loss, each summed over its pairs.
    """

    compares = False
    through_kl = False

    def __init__(self, section: Any) -> None:
        """Take the section of the objective."""
        self.settings = section
        self.reported: dict[str, Tensor] = {}

    @abstractmethod
    def losses(self, pairs: Pairs) -> Tensor:
        """ℓ of each pair, [B]."""

    @abstractmethod
    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """The reward of each chosen and of each rejected answer, [B] each."""

    def loss(self, model: nn.Module, batch: PairBatch) -> Tensor:
        """Σ over the pairs of a batch, a scalar with a gradient."""
        reference = reference_of(model) if self.compares else None
        given: dict[str, Any] = {**batch.inputs, "targets": batch.targets}
        given |= {"positions": batch.positions, "lengths": batch.lengths}
        stored: list[Tensor] = []
        if reference is not None and not reference.joined:
            with reference.acting():
                model(**given, wanted=lambda _, hidden, __: _stored(stored, hidden, batch))

        def wanted(head: OutputHead, hidden: Tensor, device: str | None) -> Tensor:
            chunk = chunk_rows(_vocabulary(head, hidden), device or hidden.device.type)
            return self._scored(head, hidden, batch, chunk, reference, stored)

        joined = reference is not None and reference.joined
        with reference.in_one_pass() if reference and joined else nullcontext():
            loss: Tensor = model(**given, wanted=wanted)
        return loss

    def _scored(
        self,
        head: OutputHead,
        hidden: Tensor,
        batch: PairBatch,
        chunk: int,
        reference: Reference | None,
        stored: Sequence[Tensor],
    ) -> Tensor:
        """The loss from the head's input, [rows, tokens, H], or twice as many rows for both."""
        at = tuple(batch.positions.T)
        compared = None
        if reference is not None:
            rows = len(batch.targets)
            of_reference = stored[0] if stored else hidden[rows:].detach()[at]
            compared = of_reference, _logits(head, reference)
            hidden = hidden if stored else hidden[:rows]
        targets = Targets(
            batch.targets[at],
            batch.positions,
            _logits(head),
            chunk,
            compared,
            sum(batch.counts[: len(batch.counts) // 2]),
            self.through_kl,
        )
        trained = [p for p in head.module.parameters() if p.requires_grad]
        known = head.finish is not None
        return scored(
            targets,
            hidden[at],
            lambda tokens: self._score(tokens, batch.counts),
            trained if known else [],
            gradient=torch.is_grad_enabled(),
        )

    def _score(self, tokens: TokenScores, counts: Sequence[int]) -> Tensor:
        """The loss of a batch, and its figures."""
        if not counts:  # a pass of weight zero
            self.reported = dict.fromkeys(self.figures, tokens.logp.new_zeros(()))
            return tokens.logp.sum()
        pairs = pairs_of(tokens, counts)
        losses = self.losses(pairs)
        with torch.no_grad():
            chosen, rejected = self.rewards(pairs)
            right = (chosen > rejected).double()
            found = [chosen, rejected, chosen - rejected, right]
            found += [pairs.kl] if self.compares else []
            sums = (each.detach().sum() for each in found)
            self.reported = dict(zip(self.figures, sums, strict=True))
        return losses.sum().to(tokens.logp.dtype)

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of what is reported."""
        return (*FIGURES, "kl") if self.compares else FIGURES


def pairs_of(tokens: TokenScores, counts: Sequence[int]) -> Pairs:
    """The pairs of `counts` targets each, first of the chosen answers, then of the rejected."""
    device = tokens.logp.device
    lengths = torch.tensor(counts, dtype=torch.float64).to(device, non_blocking=True)
    chosen, rejected = _sums(tokens.logp, counts).chunk(2)
    chosen_tokens, rejected_tokens = lengths.chunk(2)
    zeros = torch.zeros_like(chosen).detach()
    of_reference = zeros, zeros
    if tokens.reference is not None:
        of_reference = _sums(tokens.reference, counts).chunk(2)  # type: ignore[assignment]
    number = len(counts) // 2
    kl = zeros if tokens.kl is None else _sums(tokens.kl, counts[:number]) / chosen_tokens
    return Pairs(chosen, rejected, *of_reference, chosen_tokens, rejected_tokens, kl)


def _sums(values: Tensor, counts: Sequence[int]) -> Tensor:
    """[len(counts)], the sum of so many values for each, one after the other."""
    return torch.stack([part.double().sum() for part in values.split(list(counts))])


def _vocabulary(head: OutputHead, hidden: Tensor) -> int:
    """Logits of a position; of rows that are logits already, as many as they have."""
    return head.vocabulary if head.finish is not None else hidden.shape[-1]


def _stored(stored: list[Tensor], hidden: Tensor, batch: PairBatch) -> Tensor:
    """Store the hidden states of the targets, of a pass over the reference alone."""
    stored.append(hidden.detach()[tuple(batch.positions.T)])
    return hidden.new_zeros(())


def _logits(head: OutputHead, reference: Reference | None = None) -> Logits:
    """[chunk, V] of rows [chunk, H] at places [chunk, 2], with the head's adapter included.

    Args:
        reference: whose they are; None: the policy's.
    """
    module, finish = head.module, head.finish
    if finish is None:  # the rows are logits already
        return lambda rows, at: rows
    if reference is not None and is_adapted(module):

        def of_reference(rows: Tensor, at: Tensor) -> Tensor:
            with reference.acting(module):
                return finish(type(module).forward(module, rows))

        return of_reference
    stream = getattr(getattr(module, CHILD, None), "stream", None)

    def logits(rows: Tensor, at: Tensor) -> Tensor:
        with stream.at(at) if stream is not None else nullcontext():
            return finish(type(module).forward(module, rows))

    return logits
