"""One base product for several adapters, each of which has a segment of the tokens.

        x [T, n] ──────────────── W0 [m, n] ─────────────┐
            │  tokens of adapter k                       + ── y [T, m]
            └─ x[Tₖ] ── drop ── A_k ── z_k ── s_k·B_k·diag(E_k) ─┘ into y[Tₖ]

W0 is read (a packed one de-quantised) once in forward and once in backward, whatever the number of
adapters; every low-rank product is that of `functional.LinearWithLowRank` for the tokens of its
segment, in the same order of operations. Tokens of no segment get the base product alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dlora.lora.dropout_mask import Mask
from dlora.lora.functional import cast, cast_for_autocast, split_gradient, summed
from dlora.lora.step_values import Shared
from dlora.quant.linear import Weight, multiply, multiply_back, save_with, saved_with

_FACTORS = 3  # A, B and E of an adapter


@dataclass(frozen=True)
class LowRankPart:
    """What one adapter does to tokens [start, stop) of a batch.

    Attributes:
        E: singular values [r, 1], or None for ones.
        mask: of dropout, over these tokens.
        shared: makes A and B in the dtype of x, once for all passes of a step.
    """

    start: int
    stop: int
    A: Tensor
    B: Tensor
    E: Tensor | None
    scaling: float
    mask: Mask | None
    shared: Shared

    @property
    def place(self) -> slice:
        """Its tokens."""
        return slice(self.start, self.stop)


class LinearWithSegments(torch.autograd.Function):
    """y = x W0ᵀ + b, and in the segment of adapter k: + s_k·(drop(x) A_kᵀ)(B_k E_k)ᵀ.

    x is [T, n]; `factors` are A, B, E of each part, which autograd has to see.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_Tn: Tensor,
        weight: Weight,
        bias: Tensor | None,
        parts: Sequence[LowRankPart],
        *factors: Tensor | None,
    ) -> Tensor:
        y_Tm = multiply(x_Tn, weight, bias)
        z_of_parts = []
        for part in parts:
            A_x, B_x = cast(part.A, part.B, part.E, x_Tn.dtype, part.shared)
            own_Tn = x_Tn[part.place]
            z_Tr = (own_Tn if part.mask is None else part.mask.drop(own_Tn)) @ A_x.t()
            y_Tm[part.place].addmm_(z_Tr, B_x.t(), alpha=part.scaling)
            z_of_parts.append(z_Tr)
        save_with(ctx, weight, x_Tn, *z_of_parts, *factors)
        ctx.parts = [(p.place, p.scaling, p.mask, p.shared) for p in parts]
        return y_Tm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, x_Tn, *rest = saved_with(ctx)
        z_of_parts, factors = rest[: len(ctx.parts)], rest[len(ctx.parts) :]
        dy_Tm, needs = grads[0], ctx.needs_input_grad
        dx_Tn = multiply_back(dy_Tm, weight) if needs[0] else None
        found: list[Tensor | None] = []
        for k, (place, scaling, mask, shared) in enumerate(ctx.parts):
            A, B, E = factors[_FACTORS * k : _FACTORS * (k + 1)]
            needs_A, needs_B, _ = needs[4 + _FACTORS * k : 4 + _FACTORS * (k + 1)]
            own_Tn, dy_own, dA, dB, dE = x_Tn[place], dy_Tm[place], None, None, None
            A_x, B_x = cast(A, B, E, dy_Tm.dtype, shared)
            keep = mask.keep(x_Tn.shape[1]) if mask is not None and needs[0] else None
            dyB_Tr = dy_own @ B_x
            if dx_Tn is not None and keep is None:
                dx_Tn[place].addmm_(dyB_Tr, A_x, alpha=scaling)
            elif dx_Tn is not None and keep is not None:
                dx_Tn[place].addcmul_(dyB_Tr @ A_x, keep, value=scaling * mask.scale)
            if needs_A:
                dropped_Tn = own_Tn if mask is None else mask.drop(own_Tn, keep)
                dA = summed(dyB_Tr, dropped_Tn, A.dtype, scaling)
            if needs_B:
                dB, dE = split_gradient(summed(dy_own, z_of_parts[k], B.dtype, scaling), B, E)
            found += [dA, dB, dE]
        return dx_Tn, None, None, None, *found


def linear(x: Tensor, weight: Weight, bias: Tensor | None, parts: Sequence[LowRankPart]) -> Tensor:
    """x [..., n], weight [m, n], packed or not → y [..., m]; see `LinearWithSegments`.

    Args:
        parts: over the tokens of x in their order, without overlap.
    """
    factors = [tensor for part in parts for tensor in (part.A, part.B, part.E)]
    with cast_for_autocast(x, weight, bias) as inputs:
        x, weight, bias = inputs
        x_Tn = x.reshape(-1, x.shape[-1])
        y_Tm = LinearWithSegments.apply(x_Tn, weight, bias, parts, *factors)
        return y_Tm.view(*x.shape[:-1], y_Tm.shape[1])
