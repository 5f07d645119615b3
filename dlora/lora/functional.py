"""The low-rank product as one autograd function per layer: all of LoRA's arithmetic.

        x [T, n] ──────────── W0 [m, n] ───────────┐
            │                                      + ── y [T, m]
            └─ drop ── A [r, n] ── z [T, r] ── s·B·diag(E) [m, r]

Names end with their shapes: T tokens, n = in_features, m = out_features, r = LoRA rank, V = rows
of an embedding. Everything is computed in the dtype of x, which is that of W0 unless W0 is packed;
A and B are masters of a higher precision that are cast on the way in; their gradients are summed in
that precision. A packed W0 is de-quantised once in forward and once in backward, each time for
one product.

    y   = x W0ᵀ + b + s·z Bᵀ            z  = drop(x) Aᵀ
    dB  = s·dyᵀ z                       dA = s·(dy B)ᵀ drop(x)
    dx  = dy W0 + drop'(s·(dy B) A)

Only x and z are saved; the mask of drop is made again. The low-rank part is added into the base
product, so that no second tensor of the size of the output ever exists.

A form with singular values E [r, 1] (AdaLoRA) has B·diag(E) in the place of B, and with
G = s·dyᵀ z [m, r] the gradients dB = G·diag(E) and dE_i = Σ_j G_ji B_ji: nothing more is saved, and
nothing of the size of T is computed.

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1; Zhang et al. 2023,
https://arxiv.org/abs/2303.10512, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dlora.lora.dropout_mask import Mask, dropped
from dlora.lora.master_products import by_master
from dlora.lora.step_values import Shared, made_anew
from dlora.quant.linear import Weight, multiply, multiply_back, save_with, saved_with

_CAST_BYTES = 1 << 24  # of a factor that are cast at once


class LinearWithLowRank(torch.autograd.Function):
    """y = x W0ᵀ + b + s·(drop(x) Aᵀ) (B E)ᵀ for x [T, n], W0 [m, n], A [r, n], B [m, r].

    E is [r, 1], the diagonal of a matrix, or None for the identity. Shapes of x with more dims are
    its callers': what a `Function` returns must be no view, which models could not add to in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_Tn: Tensor,
        weight: Weight,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        E: Tensor | None,
        scaling: float,
        mask: Mask | None,
        shared: Shared,
    ) -> Tensor:
        A_x, B_x = cast(A, B, E, x_Tn.dtype, shared)
        z_Tr = (x_Tn if mask is None else mask.drop(x_Tn)) @ A_x.t()
        y_Tm = multiply(x_Tn, weight, bias)
        y_Tm.addmm_(z_Tr, B_x.t(), alpha=scaling)
        save_with(ctx, weight, x_Tn, z_Tr, A, B, E)
        ctx.scaling, ctx.mask, ctx.shared = scaling, mask, shared
        return y_Tm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, x_Tn, z_Tr, A, B, E = saved_with(ctx)
        keep = None
        if ctx.mask is not None and ctx.needs_input_grad[0]:
            keep = ctx.mask.keep(x_Tn.shape[1])
        dy_Tm = grads[0]
        A_x, B_x = cast(A, B, E, dy_Tm.dtype, ctx.shared)
        dyB_Tr = dy_Tm @ B_x
        dx_Tn = dA = dB = dE = None
        if ctx.needs_input_grad[0]:
            dx_Tn = multiply_back(dy_Tm, weight)
            if keep is None:
                dx_Tn.addmm_(dyB_Tr, A_x, alpha=ctx.scaling)
            else:
                low_rank_Tn = dyB_Tr @ A_x
                dx_Tn.addcmul_(low_rank_Tn, keep, value=ctx.scaling * ctx.mask.scale)
        if ctx.needs_input_grad[3]:
            dropped_Tn = x_Tn if ctx.mask is None else ctx.mask.drop(x_Tn, keep)
            dA = summed(dyB_Tr, dropped_Tn, A.dtype, ctx.scaling)
        if ctx.needs_input_grad[4]:
            dB, dE = split_gradient(summed(dy_Tm, z_Tr, B.dtype, ctx.scaling), B, E)
        return dx_Tn, None, None, dA, dB, dE, None, None, None


class EmbeddingWithLowRank(torch.autograd.Function):
    """y = W0[ids] + s·Aᵀ[ids] (B E)ᵀ for ids [T], W0 [V, m], A [r, V], B [m, r], E [r, 1].

    A row that is the base's `padding_idx` takes part but receives no gradient, as in PEFT.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ids_T: Tensor,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        E: Tensor | None,
        scaling: float,
        padding_idx: int | None,
    ) -> Tensor:
        z_Tr = A.t()[ids_T].to(weight.dtype)
        y_Tm = F.embedding(ids_T, weight)
        y_Tm.addmm_(z_Tr, times(B, E).to(weight.dtype).t(), alpha=scaling)
        ctx.save_for_backward(ids_T, z_Tr, A, B, E)
        ctx.scaling, ctx.padding_idx = scaling, padding_idx
        return y_Tm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ids_T, z_Tr, A, B, E = ctx.saved_tensors
        dy_Tm = grads[0]
        dA = dB = dE = None
        if ctx.needs_input_grad[2]:
            dz_Tr = (dy_Tm @ times(B, E).to(dy_Tm.dtype)).to(A.dtype) * ctx.scaling
            if ctx.padding_idx is not None:
                dz_Tr = dz_Tr.masked_fill((ids_T == ctx.padding_idx)[:, None], 0)
            dA = torch.zeros_like(A).index_add_(1, ids_T, dz_Tr.t())
        if ctx.needs_input_grad[3]:
            dB, dE = split_gradient(summed(dy_Tm, z_Tr, B.dtype, ctx.scaling), B, E)
        return None, None, dA, dB, dE, None, None


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    E: Tensor | None = None,
    mask: Mask | None = None,
    shared: Shared = made_anew,
) -> Tensor:
    """Base product and low-rank update in one: see `LinearWithLowRank`.

    Args:
        E: singular values [r, 1], or None for ones.
        mask: of dropout, over the rows and columns of x.
        shared: makes A and B in the dtype of x, once for all passes of a step.

    Under `torch.autocast` the product is computed in autocast's dtype, as `F.linear` is.
    """
    with cast_for_autocast(x, weight, bias) as inputs:
        x, *rest = inputs
        x_Tn = x.reshape(-1, x.shape[-1])
        y_Tm = LinearWithLowRank.apply(x_Tn, *rest, A, B, E, scaling, mask, shared)
        return y_Tm.view(*x.shape[:-1], y_Tm.shape[1])


def low_rank(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    E: Tensor | None = None,
    mask: Mask | None = None,
) -> Tensor:
    """s·(drop(x) Aᵀ)(B E)ᵀ [..., m] alone, what `linear` adds to the base product."""
    with cast_for_autocast(x, x, None) as (x, _, _):
        z = by_master(dropped(x, mask, -1), A, F.linear)
        return by_master(z, times(B, E), F.linear) * scaling


@contextmanager
def cast_for_autocast(
    x: Tensor, weight: Weight, bias: Tensor | None
) -> Iterator[tuple[Tensor, Weight, Tensor | None]]:
    """(x, weight, bias) as `F.linear` takes them under `torch.autocast`, which is off inside."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        yield x, weight, bias
        return
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        yield x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def embedding(
    ids: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    padding_idx: int | None,
    *,
    E: Tensor | None = None,
) -> Tensor:
    """Table look-up and low-rank update in one: see `EmbeddingWithLowRank`."""
    y_Tm = EmbeddingWithLowRank.apply(ids.reshape(-1), weight, A, B, E, scaling, padding_idx)
    return y_Tm.view(*ids.shape, weight.shape[1])


def cast(
    A: Tensor, B: Tensor, E: Tensor | None, dtype: torch.dtype, shared: Shared
) -> tuple[Tensor, Tensor]:
    """A and B·diag(E) in a dtype."""
    if A.dtype == dtype:
        return A, times(B, E)
    A_x = shared(f"A {dtype}", lambda: A.to(dtype))
    return A_x, shared(f"B {dtype}", lambda: times(B, E).to(dtype))


def times(B: Tensor, E: Tensor | None) -> Tensor:
    """B·diag(E) in the masters' dtype, so that the product is rounded once."""
    return B if E is None else B * E.t()


def split_gradient(gradient: Tensor, B: Tensor, E: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of B and E from that of B·diag(E), all [m, r] but dE [r, 1]."""
    if E is None:
        return gradient, None
    return gradient * E.t(), (gradient * B).sum(0).unsqueeze(1)


def summed(left_Tp: Tensor, right_Tq: Tensor, dtype: torch.dtype, scaling: float) -> Tensor:
    """scaling · leftᵀ right [p, q], summed over the tokens in `dtype` and never in less.

    A sum in the factors' bfloat16 would be rounded once more in every micro-batch.
    """
    if torch.compiler.is_compiling() and left_Tp.dtype != dtype:
        return _summed(left_Tp, right_Tq, dtype, scaling)
    left_pT = left_Tp.t()
    sum_pq = left_Tp.new_empty(len(left_pT), right_Tq.shape[1], dtype=dtype)
    alike = left_Tp.dtype == right_Tq.dtype
    if alike and left_Tp.dtype == dtype:
        return sum_pq.addmm_(left_pT, right_Tq, beta=0, alpha=scaling)
    if alike and left_Tp.is_cuda and dtype == torch.float32:
        return torch.addmm(sum_pq, left_pT, right_Tq, dtype, beta=0, alpha=scaling, out=sum_pq)
    # Elsewhere torch has no such product: it takes factors in `dtype`, some columns at a time.
    left_pT = left_pT.to(dtype)
    step = max(1, _CAST_BYTES // (len(right_Tq) * dtype.itemsize or 1))
    for first in range(0, right_Tq.shape[1], step):
        columns = right_Tq[:, first : first + step].to(dtype)
        sum_pq[:, first : first + step].addmm_(left_pT, columns, beta=0, alpha=scaling)
    return sum_pq


@torch.library.custom_op("dlora::summed", mutates_args=())
def _summed(left_Tp: Tensor, right_Tq: Tensor, dtype: torch.dtype, scaling: float) -> Tensor:
    """`summed` as an operator, for graphs of torch's compiler: its loop depends on T."""
    return summed(left_Tp, right_Tq, dtype, scaling)


@_summed.register_fake
def _(left_Tp: Tensor, right_Tq: Tensor, dtype: torch.dtype, scaling: float) -> Tensor:
    return left_Tp.new_empty((left_Tp.shape[1], right_Tq.shape[1]), dtype=dtype)
