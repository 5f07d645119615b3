"""DoRA's arithmetic: rows of W0 + s·B·A rescaled to a trained length, in one autograd function.

    V = W0 + s·B·A  [m, n]     n_j = ‖V_j‖  [m], a constant in backward     d = μ/n,  e = d − 1

    y = W0 x + b + e⊙v + s·z Bᵀ        v = (W0 + s·B·A) drop(x),   z = A drop(x)

Without dropout that is y = v + e⊙v + b. It is e that is cast to the dtype of x: in bfloat16 the
rounding of d itself would be of the size of what training changes. With G = ∂L/∂y and Ĝ = d⊙G,

    dμ_j = Σ_T G·v / n_j        dB = s·Ĝᵀ z        dA = s·(Ĝ B)ᵀ drop(x)

    n_j² = ‖W0_j‖² + 2s⟨B_j, C_j⟩ + s²·B_j (A Aᵀ) B_jᵀ        C = W0 Aᵀ  [m, r]

so that nothing of the size of W0 is made but W0 itself, which forward has anyway (gathered, or
de-quantised once). ‖W0_j‖² never changes. The norm is taken in the masters' dtype, of the masters.

dμ needs v, of the size of the output: computing W0 x again would cost half a step more. Without
bias and dropout v is y/d, so y itself is saved, as the next operation often does anyway, and

    dμ_j = Σ_T G·y / μ_j

which is undefined where a magnitude is exactly 0: it gets no gradient. With a bias, which in
bfloat16 may outweigh what is added to it, or with dropout v is saved, beside LoRA's x and z.

Source: Liu et al. 2024, https://arxiv.org/abs/2402.09353, section 4.3 for the constant norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dlora.lora import functional, functional_convolution
from dlora.lora.dropout_mask import Mask, dropped
from dlora.lora.functional import cast, cast_for_autocast, summed
from dlora.lora.step_values import Shared
from dlora.quant.linear import Weight, save_with, saved_with, whole

_CHUNK_BYTES = {"cpu": 1 << 20}  # of W0 that are cast at once, elsewhere _CHUNK_ELSEWHERE
_CHUNK_ELSEWHERE = 1 << 24


class Rows(NamedTuple):
    """What rescales the rows of W0 + s·B·A: μ [m], trained, and ‖W0_j‖² [m].

    `shared` returns n [m], which it makes with its argument unless it has it already: n is the same
    in all passes between two optimizer steps. Where n is known, it is `norms`.
    """

    magnitude: Tensor
    squares: Tensor
    shared: Shared
    norms: Tensor | None = None


def row_squares(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """‖W0_j‖² [m] of a weight [m, n], computed in `dtype`."""
    return torch.cat([part.square().sum(1) for part in _in_dtype(weight, dtype)])


def row_norms(weight: Tensor, A: Tensor, B: Tensor, scaling: float, squares: Tensor) -> Tensor:
    """‖W0_j + s·B_j A‖ [m] in the dtype of the masters A [r, n] and B [m, r].

    Clamped to the rounding error where the update cancels a row, and above 0 for a row of zeros.

    Args:
        weight: W0 [m, n].
        squares: ‖W0_j‖².
    """
    C_mr = torch.cat([part @ A.t() for part in _in_dtype(weight, A.dtype)])
    # ⟨B_j, 2s·C_j + s²·A Aᵀ B_j⟩
    inner_mr = torch.addmm(C_mr, B, A @ A.t(), beta=2 * scaling, alpha=scaling**2)
    found = squares + (B * inner_mr).sum(1)
    least = squares * torch.finfo(A.dtype).eps + torch.finfo(A.dtype).tiny
    return found.maximum(least).sqrt_()


def _in_dtype(weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """All rows of a weight in `dtype`, some at a time where they have to be cast."""
    if weight.dtype == dtype:
        yield weight
        return
    limit = _CHUNK_BYTES.get(weight.device.type, _CHUNK_ELSEWHERE)
    step = max(1, limit // (weight.shape[1] * dtype.itemsize))
    for first in range(0, len(weight), step):
        yield weight[first : first + step].to(dtype)


class LinearWithDora(torch.autograd.Function):
    """y of the formulas above for x [T, n], W0 [m, n], A [r, n], B [m, r]."""

    @staticmethod
    def forward(
        ctx: Any,
        x_Tn: Tensor,
        weight: Weight,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
        squares: Tensor,
        shared: Shared,
        norms: Tensor | None,
        scaling: float,
        mask: Mask | None,
    ) -> Tensor:
        dropped_Tn = x_Tn if mask is None else mask.drop(x_Tn)
        A_x, B_x = cast(A, B, None, x_Tn.dtype, shared)
        z_Tr, B_rm = dropped_Tn @ A_x.t(), B_x.t()
        dense = whole(weight, x_Tn.dtype)
        if norms is None:
            norms = shared("norms", lambda: row_norms(dense, A, B, scaling, squares))
        e = excess(magnitude, norms, x_Tn.dtype)
        v_Tm = F.linear(dropped_Tn, dense).addmm_(z_Tr, B_rm, alpha=scaling)
        if mask is not None:
            y_Tm = F.linear(x_Tn, dense, bias).addmm_(z_Tr, B_rm, alpha=scaling)
            y_Tm.addcmul_(v_Tm, e)
        elif bias is not None:
            y_Tm = torch.addcmul(v_Tm, v_Tm, e).add_(bias)
        else:
            y_Tm = v_Tm.addcmul_(v_Tm, e)
        along, lengths = (y_Tm, magnitude) if y_Tm is v_Tm else (v_Tm, norms)
        save_with(ctx, weight, x_Tn, z_Tr, along, A, B, lengths, e)
        ctx.scaling, ctx.mask, ctx.shared = scaling, mask, shared
        return y_Tm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, x_Tn, z_Tr, along, A, B, lengths, e = saved_with(ctx)
        keep = None
        if ctx.mask is not None and ctx.needs_input_grad[0]:
            keep = ctx.mask.keep(x_Tn.shape[1])
        dy_Tm = grads[0]
        dv_Tm = torch.addcmul(dy_Tm, dy_Tm, e)  # through the low-rank part
        A_x, B_x = cast(A, B, None, dy_Tm.dtype, ctx.shared)
        dvB_Tr = dv_Tm @ B_x
        dx_Tn = dA = dB = dmagnitude = None
        if ctx.needs_input_grad[3]:
            dropped_Tn = x_Tn if ctx.mask is None else ctx.mask.drop(x_Tn, keep)
            dA = summed(dvB_Tr, dropped_Tn, A.dtype, ctx.scaling)
        if ctx.needs_input_grad[4]:
            dB = summed(dv_Tm, z_Tr, B.dtype, ctx.scaling)
        if ctx.needs_input_grad[0]:
            dense = whole(weight, dy_Tm.dtype, dy_Tm)
            if keep is None:
                dx_Tn = (dv_Tm @ dense).addmm_(dvB_Tr, A_x, alpha=ctx.scaling)
            else:
                inner_Tn = torch.mul(dy_Tm, e, out=dv_Tm) @ dense
                inner_Tn.addmm_(dvB_Tr, A_x, alpha=ctx.scaling)
                dx_Tn = (dy_Tm @ dense).addcmul_(inner_Tn, keep, value=ctx.mask.scale)
        if ctx.needs_input_grad[5]:
            sums = torch.mul(dy_Tm, along, out=dv_Tm).sum(0, dtype=lengths.dtype)
            dmagnitude = torch.where(lengths == 0, 0, sums / lengths)
        return dx_Tn, None, None, dA, dB, dmagnitude, None, None, None, None, None


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    rows: Rows,
    *,
    mask: Mask | None = None,
) -> Tensor:
    """See `LinearWithDora`; arguments as of `dlora.lora.functional.linear`."""
    with cast_for_autocast(x, weight, bias) as inputs:
        x, *rest = inputs
        x_Tn = x.reshape(-1, x.shape[-1])
        y_Tm = LinearWithDora.apply(x_Tn, *rest, A, B, *rows, scaling, mask)
        return y_Tm.view(*x.shape[:-1], y_Tm.shape[1])


def embedding(
    ids: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    rows: Rows,
    padding_idx: int | None,
) -> Tensor:
    """y = d⊙(W0[ids] + s·Aᵀ[ids] Bᵀ) for ids [...], W0 [V, m]: a row of V is a column of the table.

    W0ᵀ [m, V] stands for W0 in the norm.
    """
    v = functional.embedding(ids, weight, A, B, scaling, padding_idx)
    return torch.addcmul(v, v, _excess_at(weight.t(), A, B, scaling, rows, v.dtype))


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    rows: Rows,
    convolve: functional_convolution.Convolve,
    *,
    mask: Mask | None = None,
) -> Tensor:
    """The formulas above with a convolution in place of each product, by `functional_convolution`.

    A row of W0 is all that makes one channel of the output: its flattened kernel.
    """
    v = functional_convolution.convolution(
        dropped(x, mask, 1 - weight.ndim), weight, None, A, B, scaling, convolve
    )
    e = _excess_at(weight.flatten(1), A, B, scaling, rows, v.dtype)
    e = e.view(-1, *(1 for _ in weight.shape[2:]))
    if mask is None:
        y = torch.addcmul(v, v, e)
        return y if bias is None else y + bias.to(y.dtype).view_as(e)
    y = functional_convolution.convolution(x, weight, bias, A, B, scaling, convolve, mask=mask)
    return torch.addcmul(y, v, e)


def excess(magnitude: Tensor, norms: Tensor, dtype: torch.dtype) -> Tensor:
    """e = μ/n − 1 [m], cast to `dtype`."""
    return (magnitude / norms - 1).to(dtype)


def _excess_at(
    weight: Tensor, A: Tensor, B: Tensor, scaling: float, rows: Rows, dtype: torch.dtype
) -> Tensor:
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        norms = rows.shared("norms", lambda: row_norms(weight, A, B, scaling, rows.squares))
    return excess(rows.magnitude, norms, dtype)
