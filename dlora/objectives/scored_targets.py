"""Log-probabilities of the targets beside those of a reference, in chunks, and their loss.

    logp_i = log softmax(f(W h_i))[t_i]                      f: as in `chunked_loss`
    ref_i  = the same of the reference's hidden state
    kl_i   = Σ_v p_ref(v)·(log p_ref(v) − log p(v))          KL(π_ref ‖ π) of the next token

    L = score(logp, ref, kl)      ∂L/∂z_i = c_i·(1[t_i] − p_i) + k_i·(p_i − p_ref,i)
                                  c = ∂L/∂logp, k = ∂L/∂kl

L is no sum over tokens, so c and k are known when all chunks are done. ∂logp_i/∂h_i is kept for
each target, [N, H], and multiplied by c_i then. Where the head itself is trained, or kl counts, the
head's products are computed once more instead. There is never a whole logits tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class TokenScores:
    """Of N targets, in float32; in float64 of a float64 model.

    Attributes:
        logp: [N], of the policy.
        reference: [N], of the reference; None without one.
        kl: [M], of the first M targets; None without a reference.
    """

    logp: Tensor
    reference: Tensor | None = None
    kl: Tensor | None = None


Logits = Callable[[Tensor, Tensor], Tensor]  # (rows [chunk, H], places [chunk, 2]) → [chunk, V]
Score = Callable[[TokenScores], Tensor]


@dataclass(frozen=True)
class Targets:
    """The targets of a pass.

    Attributes:
        ids: [N], the tokens.
        places: [N, 2], where they stand.
        logits: of the policy.
        chunk: rows of logits at a time.
        reference: its hidden states [N, H] and logits; None without one.
        compared: M, of how many targets kl is wanted.
        through_kl: whether the loss depends on kl.
    """

    ids: Tensor
    places: Tensor
    logits: Logits
    chunk: int
    reference: tuple[Tensor, Logits] | None = None
    compared: int = 0
    through_kl: bool = False

    def pieces(self) -> list[slice]:
        """The chunks."""
        return [slice(i, i + self.chunk) for i in range(0, len(self.ids), self.chunk)]

    def of_reference(self, piece: slice) -> Tensor:
        """log p_ref [chunk, V]."""
        assert self.reference is not None
        hidden, logits = self.reference
        with torch.no_grad():
            return log_softmax(logits(hidden[piece], self.places[piece]))

    def compared_in(self, piece: slice) -> int:
        """Of how many targets of a chunk, the first ones, kl is wanted."""
        return max(0, min(self.compared - piece.start, len(self.ids[piece])))


def log_softmax(z: Tensor) -> Tensor:
    """log p [chunk, V] of logits, in the dtype of the loss."""
    return torch.log_softmax(z, -1, torch.float64 if z.dtype == torch.float64 else torch.float32)


def scored(
    targets: Targets, hidden: Tensor, score: Score, trained: list[Tensor], *, gradient: bool
) -> Tensor:
    """`score` of the targets' scores, a scalar through which gradients flow to `hidden` [N, H].

    Args:
        trained: the head's parameters that are trained.
        gradient: whether one is wanted.
    """
    wanted = gradient and (hidden.requires_grad or bool(trained))
    loss: Tensor = _Scored.apply(targets, score, wanted, hidden, *trained)
    return loss


class _Scored(torch.autograd.Function):
    """See `scored`. All gradients are computed in forward, where the head is gathered."""

    @staticmethod
    def forward(
        ctx: Any, targets: Targets, score: Score, wanted: bool, hidden: Tensor, *trained: Tensor
    ) -> Tensor:
        again = bool(trained) or targets.through_kl
        scores, of_hidden = _scores(targets, hidden, keep=wanted and not again)
        with torch.enable_grad():
            leaves = [scores.logp.requires_grad_(wanted)]
            leaves += [scores.kl.requires_grad_(wanted)] if scores.kl is not None else []
            loss = score(scores)
        if wanted:
            c, *k = torch.autograd.grad(loss, leaves, allow_unused=True)
            c = torch.zeros_like(scores.logp) if c is None else c
            if again:
                ctx.sums = _gradients(targets, (hidden, *trained), c, k[0] if k else None)
            else:
                ctx.sums = [of_hidden.mul_(c[:, None].to(of_hidden.dtype))]
        return loss.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if s is None else s.mul_(grads[0].to(s.dtype)) for s in ctx.sums]
        return None, None, None, *scaled


def _scores(targets: Targets, hidden: Tensor, *, keep: bool) -> tuple[TokenScores, Tensor]:
    """The scores, and ∂logp_i/∂h_i [N, H] where it is kept."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logp = hidden.new_empty(len(targets.ids), dtype=dtype)
    compares = targets.reference is not None
    reference = torch.empty_like(logp) if compares else None
    kl = logp.new_empty(targets.compared) if compares else None
    of_hidden = torch.empty_like(hidden) if keep else hidden.new_empty(0)
    for piece in targets.pieces():
        ids = targets.ids[piece, None]
        with torch.set_grad_enabled(keep):
            h = hidden.detach()[piece].requires_grad_(keep)
            z = targets.logits(h, targets.places[piece])
        log_p = log_softmax(z.detach())
        logp[piece] = log_p.gather(1, ids)[:, 0]
        if reference is not None and kl is not None:
            log_ref = targets.of_reference(piece)
            reference[piece] = log_ref.gather(1, ids)[:, 0]
            if first := targets.compared_in(piece):
                kl[piece.start : piece.start + first] = _kl(log_p[:first], log_ref[:first])
            del log_ref
        if keep:
            of_hidden[piece] = torch.autograd.grad(z, h, _of_logp(log_p, ids).to(z.dtype))[0]
    return TokenScores(logp, reference, kl), of_hidden


def _kl(log_p: Tensor, log_ref: Tensor) -> Tensor:
    """[rows], KL(π_ref ‖ π) of each row; `log_ref` is used up."""
    apart = log_ref - log_p
    return log_ref.exp_().mul_(apart).sum(-1)


def _of_logp(log_p: Tensor, ids: Tensor) -> Tensor:
    """∂logp/∂z = 1[t] − p [chunk, V], made in the place of log p."""
    p = log_p.exp_().neg_()
    return p.scatter_(1, ids, p.gather(1, ids) + 1)


def _gradients(
    targets: Targets, inputs: tuple[Tensor, ...], c: Tensor, k: Tensor | None
) -> list[Tensor | None]:
    """∂L/∂ each of `inputs`, the hidden states [N, H] and the head's trained parameters.

    Args:
        c: ∂L/∂logp [N].
        k: ∂L/∂kl [M], or None.
    """
    hidden, *trained = inputs
    sums = [torch.zeros_like(i) if i.requires_grad else None for i in inputs]
    for piece in targets.pieces():
        with torch.enable_grad():
            h = hidden.detach()[piece].requires_grad_(sums[0] is not None)
            z = targets.logits(h, targets.places[piece])
        log_p, first = log_softmax(z.detach()), targets.compared_in(piece)
        pulled = None
        if k is not None and first:
            weights = k[piece.start : piece.start + first, None]
            p_ref = targets.of_reference(piece)[:first].exp_()
            pulled = log_p[:first].exp().sub_(p_ref).mul_(weights)
        dz = _of_logp(log_p, targets.ids[piece, None]).mul_(c[piece, None])
        if pulled is not None:
            dz[:first] += pulled
        wanted = [t for t, s in zip((h, *trained), sums, strict=True) if s is not None]
        # Unused: A and B of a head that is disabled or merged. Their gradient stays zero.
        found = iter(torch.autograd.grad(z, wanted, dz.to(z.dtype), allow_unused=True))
        for index, summed in enumerate(sums):
            if summed is not None and (gradient := next(found)) is not None:
                target = summed[piece] if index == 0 else summed
                target += gradient
    return sums
