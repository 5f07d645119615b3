"""Distillation: the model learns from a teacher's distribution of each target token as well.

    L = c·CE + w·T²·KL(p ‖ q)        p = softmax(z'/T), q = softmax(z/T)
    ∂L/∂z = c·(softmax(z) − 1[t]) + w·T·(q − p)

    z, z'   logits [V] of model and teacher at a position whose target is t
    CE      −log softmax(z)[t]
    T, w, c `distill.temperature`, `distill.weight`, `distill.ce_weight`

With `distill.top_k` the KL is that of k + 1 events: the k tokens that are likeliest to the
teacher, and any other one. It is that of p with q's own shape outside of them, and so computed:

    p_j = q_j·(1 − Σ_{i≤k} p_i)/(1 − Σ_{i≤k} q_i)        j outside

T² keeps the gradient of the KL at its size, whatever T is. With c = 1 − α and w = α it is the
mixture of the two. Logits of both are there for a chunk of targets at a time (`chunked_loss`).

Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlora.objectives.chunked_loss import (
    Criterion,
    at_least_float32,
    chunk_rows,
    less_target,
    log_softmax,
)
from dlora.objectives.head_input import HeadInput
from dlora.objectives.objective import Batch
from dlora.objectives.teachers import Logits, Teacher, TopK
from dlora.registry import option

BASE = "base"  # the value of `distill.teacher` that means W0 itself


@dataclass(frozen=True)
class DistillOptions:
    """The section `distill`."""

    teacher: str = option(
        "base",
        "base: W0 of the model itself, without the adapter that is trained; another base of the "
        "same vocabulary: hub id, directory or .gguf file; or a directory of `dlora teach`",
    )
    teacher_adapter: str | None = option(
        None, "adapter that the teacher computes with, a directory or hub id; null: none"
    )
    teacher_quantization: str = option(
        "none", "packed storage of a teacher that is another base", room="quant"
    )
    temperature: float = option(1.0, "T: both distributions are softmax(logits/T)", gt=0)
    weight: float = option(1.0, "of T² times the KL divergence from the teacher", gt=0)
    ce_weight: float = option(1.0, "of the cross entropy with the targets", ge=0)
    top_k: int | None = option(
        None,
        "count the teacher's k likeliest tokens one by one and all others as one; null: all of "
        "them, or all that its file has",
        ge=1,
    )


class Distill:
    """Cross entropy, and the divergence from a teacher, which has to be set before a loss.

    Attributes:
        teacher: see `Teacher`.
        reported: of the last loss, over its targets: `ce`, and `kl`, at T and without its weight.
    """

    name = "distill"
    figures = ("ce", "kl")
    compiles = False
    clashes = (
        ("train.task", "!=", "causal", "whose logits are those of a vocabulary"),
        ("adapter.init_lora_weights", "==", "lora_ga", "since it starts from the targets alone"),
    )

    def __init__(self, section: Any) -> None:
        """Take the section `distill`."""
        self.section = section
        self.teacher: Teacher | None = None
        self.reported: dict[str, Tensor] = {}

    @property
    def extra_passes(self) -> int:
        """Passes over W0 without a gradient, beside the one that is learned from."""
        return int(self.section.teacher == BASE)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        assert self.teacher is not None
        return self.teacher.loss(model, batch, self._loss_at)

    def _loss_at(self, teacher: Logits | TopK, head: HeadInput) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64, device=head.hidden.device)
        self.reported = {"ce": zero, "kl": zero.clone()}
        return head.loss(self.criterion(teacher, head.targets[tuple(head.positions.T)]))

    def criterion(self, teacher: Logits | TopK, targets: Tensor) -> Criterion:
        """Σ L of the targets [N], for chunks of them."""
        c, w, T = self.section.ce_weight, self.section.weight, self.section.temperature

        def of(z: Tensor, piece: slice) -> tuple[Tensor, Callable[[], Tensor]]:
            t, log_s = targets[piece], log_softmax(z)
            ce = -log_s.gather(1, t[:, None]).sum()
            log_q = log_s if T == 1 else log_softmax(at_least_float32(z) / T)
            log_p = self._log_p(teacher, piece, log_q)
            p = log_p.exp()
            # A token that the teacher excludes (−∞) adds nothing, whatever the model makes of it.
            kl = log_p.sub_(log_q).masked_fill_(p == 0, 0).mul_(p).sum()
            self.reported["ce"] += ce.double()
            self.reported["kl"] += kl.double()

            def gradient() -> Tensor:
                q = log_q.exp()
                dz = p.sub_(q).mul_(-w * T)
                return dz if c == 0 else dz.add_(less_target(log_s, t), alpha=c)

            return c * ce + w * T * T * kl, gradient

        return of

    def _log_p(self, teacher: Logits | TopK, piece: slice, log_q: Tensor) -> Tensor:
        k = self.section.top_k
        if isinstance(teacher, TopK):
            return with_rest(log_q, teacher.ids[piece, :k], teacher.log_p[piece, :k])
        log_p = log_softmax(at_least_float32(teacher(piece)) / self.section.temperature)
        if k is None or k >= log_p.shape[1]:
            return log_p
        likeliest = log_p.topk(k)
        return with_rest(log_q, likeliest.indices, likeliest.values)


def likeliest(head: HeadInput, temperature: float, k: int) -> TopK:
    """The k likeliest tokens of each target, from a teacher's head, a chunk at a time."""
    rows = head.rows()
    chunk = chunk_rows(head.head.vocabulary, head.device or rows.device.type)
    ids, log_p = [rows.new_empty(0, k, dtype=torch.int64)], [log_softmax(rows.new_empty(0, k))]
    for start in range(0, len(rows), chunk):
        z = at_least_float32(head.logits(rows[start : start + chunk]))
        found = log_softmax(z / temperature).topk(k)
        ids.append(found.indices)
        log_p.append(found.values)
    return TopK(torch.cat(ids), torch.cat(log_p))


def with_rest(log_q: Tensor, ids: Tensor, log_p: Tensor) -> Tensor:
    """log p [n, V] of the log p [n, k] that are known, of the tokens `ids`; see `top_k` above."""
    q_rest = log_q.exp().scatter_(1, ids, 0).sum(1, keepdim=True)
    p_rest = (1 - log_p.exp().sum(1, keepdim=True)).clamp_(min=0)
    scale = torch.where(q_rest > 0, p_rest.log() - q_rest.log(), 0)
    return (log_q + scale).scatter_(1, ids, log_p.to(log_q.dtype))
