"""What a model with its adapter says of tokens, beside what its base says: NLL, KL, top-1.

    h₀ [N, H]  a pass with adapters off      the head's input at the N positions with a target
    h  [N, H]  a pass with them on; at its head, chunk by chunk:

        log p = log softmax(f(W₀ h₀))        log q = log softmax(f(W h))         [chunk, V]
        NLL of the base  −log p[t]           NLL −log q[t]
        KL(p‖q) = Σ_v p_v (log p_v − log q_v)     agreement: argmax p = argmax q

Both heads' products are made while the head is gathered, and no more logits exist at one time than
those of the chunked loss. Where a class computes more behind its head than a function of each row,
its own logits are used, whole, of the positions with a target.

Source: KL and the cross entropy of the base's distribution, MiLoRA, https://arxiv.org/abs/2406.09044.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dlora.lora.attach import disabled
from dlora.lora.layers import CHILD
from dlora.lora.states import AdapterState
from dlora.objectives.chunked_loss import at_least_float32, chunk_rows
from dlora.objectives.objective import Batch
from dlora.objectives.output_head import OutputHead

SUMS = ("tokens", "base_nll", "nll", "kl", "agreed", "texts", "kl_kl", "kl_tokens", "tokens_tokens")


@dataclass(frozen=True)
class Forgotten:
    """Figures of a retained set.

    Attributes:
        nll, base_nll: nats per token, with the adapter and of the base.
        kl: KL(base‖tuned), nats per token.
        kl_error: its standard error over texts; NaN for one text.
        agreement: share of the tokens whose most likely token is the base's.
        tokens: those with a target.
    """

    nll: float
    base_nll: float
    kl: float
    kl_error: float
    agreement: float
    tokens: int

    @classmethod
    def of(cls, sums: Tensor) -> Forgotten:
        """The figures of the `SUMS` over all texts.

        KL = Σk/Σn is a ratio of sums over D texts, so its variance is (D/(D−1))·Σ(k − KL·n)²/(Σn)².
        """
        found = dict(zip(SUMS, sums.tolist(), strict=True))
        n, texts = found["tokens"], found["texts"]
        kl = found["kl"] / n
        spread = found["kl_kl"] - 2 * kl * found["kl_tokens"] + kl**2 * found["tokens_tokens"]
        error = float("nan")
        if texts > 1:
            error = (texts / (texts - 1) * max(spread, 0.0)) ** 0.5 / n
        return cls(found["nll"] / n, found["base_nll"] / n, kl, error, found["agreed"] / n, int(n))

    def figures(self) -> dict[str, float]:
        """Of a line of the metrics."""
        return {
            "forget_nll": self.nll,
            "forget_base_nll": self.base_nll,
            "forget_kl": self.kl,
            "forget_kl_error": self.kl_error,
            "forget_agreement": self.agreement,
        }


@torch.no_grad()
def measure(model: nn.Module, batch: Batch) -> Tensor:
    """The `SUMS` of a batch, float64 on its device: a pass with adapters off, and one with them on.

    Called on every rank as often, also for a batch without a target. The model is in eval mode.

    Args:
        model: one that `chunked_loss.install` extended.
    """
    of_text = _texts(batch)
    reader = _Reader(batch, of_text)
    how = {"positions": batch.positions, "lengths": batch.lengths, "parts": [reader]}
    with disabled(model):
        model(**batch.inputs, targets=batch.targets, **how)
    model(**batch.inputs, targets=batch.targets, **how)
    return reader.sums()


@dataclass
class _Reader:
    """Reads a pass at its head, in the place of a part's loss: first the base's, then the tuned's.

    Attributes:
        base: of the first pass, [N, H] the head's input or [N, V] logits; None before it.
        each: [N, 4] of the second one: both NLLs, KL and agreement of each token.
    """

    batch: Batch
    of_text: Tensor
    base: Tensor | None = None
    each: list[Tensor] = field(default_factory=list)

    @property
    def positions(self) -> Tensor:
        """[N, 2], the (row, token) of the targets."""
        return self.batch.positions

    @property
    def end(self) -> int:
        """Where the row ends."""
        return self.batch.targets.shape[1]

    def loss(self, head: OutputHead, hidden: Tensor, targets: Tensor, device: str | None) -> Tensor:
        """Read the input of a head whose logits are known row by row; returns 0."""
        rows, finish = hidden[tuple(self.positions.T)], head.finish
        assert finish is not None
        if self.base is None:
            self.base = rows
            return hidden.new_zeros(())
        module = head.module

        def logits(rows: Tensor) -> Tensor:
            return finish(type(module).forward(module, rows))

        chunk = max(1, chunk_rows(head.vocabulary, device or hidden.device.type) // 2)
        for start in range(0, len(rows), chunk):
            piece = slice(start, start + chunk)
            with _off(module):
                base = logits(self.base[piece])
            self._compare(base, logits(rows[piece]), piece)
        return hidden.new_zeros(())

    def loss_of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The same of logits [rows, tokens, V] that a class has computed whole."""
        rows = logits[tuple(self.positions.T)]
        if self.base is None:
            self.base = rows
        else:
            chunk = max(1, chunk_rows(logits.shape[-1], logits.device.type) // 2)
            for start in range(0, len(rows), chunk):
                piece = slice(start, start + chunk)
                self._compare(self.base[piece], rows[piece], piece)
        return logits.new_zeros(())

    def _compare(self, base: Tensor, tuned: Tensor, piece: slice) -> None:
        """Both logits [chunk, V] of the tokens in a piece of all."""
        targets = self.batch.targets[tuple(self.positions[piece].T)][:, None]
        agreed = base.argmax(-1) == tuned.argmax(-1)
        log_p = torch.log_softmax(at_least_float32(base), -1)
        log_q = torch.log_softmax(at_least_float32(tuned), -1)
        nll_p, nll_q = (-x.gather(1, targets)[:, 0] for x in (log_p, log_q))
        log_q.neg_().add_(log_p)  # log p − log q; where p is 0, of a logit −∞, it counts as 0
        p = log_p.exp_()
        kl = torch.linalg.vecdot(p, log_q.masked_fill_(p == 0, 0.0)).clamp_min(0.0)
        self.each.append(torch.stack([nll_p, nll_q, kl, agreed.to(kl.dtype)], 1).double())

    def sums(self) -> Tensor:
        """The `SUMS` of the batch."""
        positions = self.positions
        count = len(self.batch.lengths)
        found = torch.zeros(count, 5, dtype=torch.float64, device=positions.device)
        if self.each:
            each = torch.cat(self.each)
            each = torch.cat([torch.ones_like(each[:, :1]), each], 1)  # the 1 counts the token
            found.index_add_(0, self.of_text, each)
        n, k = found[:, 0], found[:, 3]
        texts = (n > 0).sum().double()
        return torch.stack([*found.sum(0), texts, k @ k, k @ n, n @ n])


def _texts(batch: Batch) -> Tensor:
    """[N], the text of each target: its row, or its sequence in a row that several share."""
    row, token = batch.positions.T
    if len(batch.lengths) <= len(batch.targets):
        return row
    ends = torch.tensor(batch.lengths, device=token.device).cumsum(0)
    return torch.bucketize(token, ends, right=True)


@contextmanager
def _off(module: nn.Module) -> Iterator[None]:
    """Inside, a module computes as if it had no adapter, and no trained copy."""
    child: Any = module._modules.get(CHILD)
    state = getattr(child, "state", None)
    if state is None or state is AdapterState.EMPTY:
        yield
        return
    child.become(AdapterState.OFF)
    try:
        yield
    finally:
        child.become(state)
