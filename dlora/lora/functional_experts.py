"""Several low-rank products beside one base product, mixed token by token by a router.

        x [T, n] ─────────────────── W0 [m, n] ────────────────────┐
            │                                                      + ── y [T, m]
            ├─ drop ── [A_1; …; A_E] ── z [T, K] ── g·s ── [B_1 | … | B_E]
            └─ R [E, n] ── ℓ [T, E] ── top k, softmax ── g [T, E]

Names end with their shapes: T tokens, n = in_features, m = out_features, E experts, K = Σ r_e rows
of all A together, P = E(E−1)/2 pairs of experts. For one token

    ℓ = R x              𝒦 = the k largest of ℓ (of equal ones the first)
    g = softmax of ℓ over 𝒦, 0 elsewhere
    y = W0 x + b + Σ_e g_e s_e B_e A_e drop(x)

All experts multiply all tokens: E/k times the low-rank operations that are needed, and no token is
moved, no shape depends on a router and no expert has a capacity. ℓ and g are computed in the
masters' dtype, float32 or float64, whatever that of x is, and no dropout acts on the router.

    dB_e = s_e·dyᵀ (g_e z_e)             dA_e = s_e·(g_e·dy B_e)ᵀ drop(x)
    dg_e = s_e·⟨dy B_e, z_e⟩             dℓ_e = g_e·(dg_e − Σ_j g_j dg_j)      dR = dℓᵀ x
    dx   = dy W0 + drop'(Σ_e s_e·(g_e·dy B_e) A_e) + dℓ R

With one expert g = 1, and every product has the bits that `functional.linear` gives it.

Source: Li et al. 2024 (MixLoRA), https://arxiv.org/abs/2404.15159; the router is that of Jiang et
al. 2024 (Mixtral), https://arxiv.org/abs/2401.04088, section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dlora.lora.balance import BalanceSums
from dlora.lora.dropout_mask import Mask, dropped
from dlora.lora.functional import cast, cast_for_autocast, summed
from dlora.lora.master_products import by_master
from dlora.lora.step_values import Shared, made_anew
from dlora.quant.linear import Weight, multiply, multiply_back, save_with, saved_with

_CAST_BYTES = 1 << 24  # of x that are cast at once


@dataclass(frozen=True)
class Experts:
    """The sizes of the experts of one layer.

    Attributes:
        ranks: r_e of each; Σ r_e = K.
        scalings: s_e of each.
        top_k: k, experts for each token.
    """

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    top_k: int

    def weighted(self, gates_TE: Tensor) -> Tensor:
        """g_e·s_e/s_1: what the first expert's scale is left to multiply."""
        if len({*self.scalings}) == 1:
            return gates_TE
        ratios = [scaling / self.scalings[0] for scaling in self.scalings]
        return gates_TE * gates_TE.new_tensor(ratios)

    def spread(self, values_TE: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, E] → [T, K]: the value of an expert for each row of its A."""
        values_TE = values_TE.to(dtype)
        if len({*self.ranks}) == 1:
            return values_TE.repeat_interleave(self.ranks[0], dim=1)
        each = zip(values_TE.unbind(1), self.ranks, strict=True)
        return torch.cat([value[:, None].expand(-1, r) for value, r in each], dim=1)

    def gathered(self, values_TK: Tensor) -> Tensor:
        """[T, K] → [T, E]: the sum over the rows of each expert's A."""
        if len({*self.ranks}) == 1:
            return values_TK.view(len(values_TK), -1, self.ranks[0]).sum(2)
        return torch.stack([part.sum(1) for part in values_TK.split(self.ranks, dim=1)], dim=1)


def chosen_of(logits_TE: Tensor, top_k: int) -> Tensor:
    """bool [T, E]: the `top_k` largest logits of each token, of equal ones the first."""
    order_TE = logits_TE.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, order_TE[:, :top_k], True)


def gates_of(logits_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    """g [T, E]: softmax over the chosen logits, 0 for the others."""
    return logits_TE.masked_fill(~chosen_TE, -torch.inf).softmax(dim=1)


def logits_of(x_Tn: Tensor, R_En: Tensor) -> Tensor:
    """ℓ = x Rᵀ [T, E] in the dtype of R."""
    if x_Tn.dtype == R_En.dtype:
        return x_Tn @ R_En.t()
    step = max(1, _CAST_BYTES // (x_Tn.shape[1] * R_En.itemsize))
    parts = [part.to(R_En.dtype) @ R_En.t() for part in x_Tn.split(step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class LinearWithExperts(torch.autograd.Function):
    """y = x W0ᵀ + b + s_1·(z ⊙ spread(g·s/s_1)) Bᵀ for x [T, n], A [K, n], B [m, K], R [E, n].

    Where there are sums for the balance of the router, backward adds this pass to them: once,
    however often the forward pass is made again for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_Tn: Tensor,
        weight: Weight,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        R: Tensor,
        experts: Experts,
        mask: Mask | None,
        shared: Shared,
        sums: BalanceSums | None,
        counted_T: Tensor | None,
    ) -> Tensor:
        A_x, B_x = cast(A, B, None, x_Tn.dtype, shared)
        logits_TE = logits_of(x_Tn, R)
        chosen_TE = chosen_of(logits_TE, experts.top_k)
        gates_TE = gates_of(logits_TE, chosen_TE)
        z_TK = (x_Tn if mask is None else mask.drop(x_Tn)) @ A_x.t()
        y_Tm = multiply(x_Tn, weight, bias)
        gated_TK = z_TK * experts.spread(experts.weighted(gates_TE), z_TK.dtype)
        y_Tm.addmm_(gated_TK, B_x.t(), alpha=experts.scalings[0])
        save_with(ctx, weight, x_Tn, z_TK, logits_TE, chosen_TE, A, B, R)
        ctx.experts, ctx.mask, ctx.shared = experts, mask, shared
        ctx.sums, ctx.counted_T = sums, counted_T
        return y_Tm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, x_Tn, z_TK, logits_TE, chosen_TE, A, B, R = saved_with(ctx)
        experts: Experts = ctx.experts
        scaling, dtype = experts.scalings[0], logits_TE.dtype
        keep = None
        if ctx.mask is not None and ctx.needs_input_grad[0]:
            keep = ctx.mask.keep(x_Tn.shape[1])
        dy_Tm = grads[0]
        A_x, B_x = cast(A, B, None, dy_Tm.dtype, ctx.shared)
        gates_TE = gates_of(logits_TE, chosen_TE)
        gates_TK = experts.spread(experts.weighted(gates_TE), z_TK.dtype)
        dyB_TK = dy_Tm @ B_x
        dz_TK = dyB_TK * gates_TK

        dgates_TE = experts.weighted(experts.gathered(dyB_TK.to(dtype) * z_TK.to(dtype))) * scaling
        mean_T1 = (gates_TE * dgates_TE).sum(1, keepdim=True)
        dlogits_TE = gates_TE * (dgates_TE - mean_T1)

        dx_Tn = dA = dB = dR = None
        if ctx.needs_input_grad[0]:
            dx_Tn = multiply_back(dy_Tm, weight)
            if keep is None:
                dx_Tn.addmm_(dz_TK, A_x, alpha=scaling)
            else:
                dx_Tn.addcmul_(dz_TK @ A_x, keep, value=scaling * ctx.mask.scale)
            dx_Tn.addmm_(dlogits_TE.to(dx_Tn.dtype), R.to(dx_Tn.dtype))
        if ctx.needs_input_grad[3]:
            dropped_Tn = x_Tn if ctx.mask is None else ctx.mask.drop(x_Tn, keep)
            dA = summed(dz_TK, dropped_Tn, A.dtype, scaling)
        if ctx.needs_input_grad[4]:
            dB = summed(dy_Tm, z_TK * gates_TK, B.dtype, scaling)
        if ctx.needs_input_grad[5]:
            dR = summed(dlogits_TE, x_Tn, R.dtype, 1.0)
        if ctx.sums is not None:
            ctx.sums.add(x_Tn, logits_TE, chosen_TE, gates_TE, ctx.counted_T)
        return dx_Tn, None, None, dA, dB, dR, None, None, None, None, None


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    R: Tensor,
    experts: Experts,
    *,
    mask: Mask | None = None,
    shared: Shared = made_anew,
    sums: BalanceSums | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Base product and mixed update in one: see `LinearWithExperts`.

    Args:
        mask: of dropout, over the rows and columns of x.
        shared: makes A and B in the dtype of x, once for all passes of a step.
        sums: backward adds to them; None: nobody balances the router.
        counted: bool [T], the tokens that are no padding; None: all.
    """
    with cast_for_autocast(x, weight, bias) as inputs:
        x, *rest = inputs
        x_Tn = x.reshape(-1, x.shape[-1])
        y_Tm = LinearWithExperts.apply(x_Tn, *rest, A, B, R, experts, mask, shared, sums, counted)
        return y_Tm.view(*x.shape[:-1], y_Tm.shape[1])


def update(
    x: Tensor, A: Tensor, B: Tensor, R: Tensor, experts: Experts, *, mask: Mask | None = None
) -> Tensor:
    """Σ_e g_e s_e B_e A_e drop(x) [..., m] alone, what `linear` adds to the base product."""
    with cast_for_autocast(x, x, None) as (x, _, _):
        x_Tn = x.reshape(-1, x.shape[-1])
        logits_TE = F.linear(x_Tn.to(R.dtype), R)
        gates_TE = gates_of(logits_TE, chosen_of(logits_TE.detach(), experts.top_k))
        z_TK = by_master(dropped(x_Tn, mask, -1), A, F.linear)
        gated_TK = z_TK * experts.spread(experts.weighted(gates_TE), z_TK.dtype)
        y_Tm = by_master(gated_TK, B, F.linear) * experts.scalings[0]
        return y_Tm.view(*x.shape[:-1], y_Tm.shape[1])
