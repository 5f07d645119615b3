"""The low-rank product of a convolution: A is a kernel, and B mixes its channels at each place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dlora.lora.dropout_mask import Mask, dropped
from dlora.lora.functional import summed, times
from dlora.lora.master_products import by_master

Convolve = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    convolve: Convolve,
    *,
    E: Tensor | None = None,
    mask: Mask | None = None,
) -> Tensor:
    """W0 ∗ x + b + s·(B E)·(A ∗ drop(x)): A is a kernel of r channels, B mixes them at each place.

    x [..., c, *space], weight [m, c, *kernel], A [r, n], B [m, r] with n = c·∏ kernel, so that
    ΔW = s·B·E·A has the elements of W0 in their order. `convolve` is the layer's own product, with
    its stride and padding. This is PEFT's form of LoRA for a convolution. y has the
    memory format of the base's product, such as channels last.
    """
    single = x.ndim < weight.ndim
    x_Nc = x.unsqueeze(0) if single else x
    kernel = A.reshape(-1, *weight.shape[1:])
    dropped_Nc = dropped(x_Nc, mask, 1)  # places are the mask's tokens, channels its columns
    z_Nr = by_master(dropped_Nc, kernel, lambda images, kernel: convolve(images, kernel, None))
    y_Nm = convolve(x_Nc, weight, bias)
    mix = _mixed if B.dtype == z_Nr.dtype or torch.compiler.is_compiling() else _Mixed.apply
    y_Nmp = mix(y_Nm.flatten(2), z_Nr.flatten(2), times(B, E), scaling, y_Nm.is_contiguous())
    y = y_Nmp.unflatten(2, y_Nm.shape[2:])
    return y.squeeze(0) if single else y


def _mixed(y_Nmp: Tensor, z_Nrp: Tensor, B: Tensor, scaling: float, contiguous: bool) -> Tensor:
    """y + s·B z, laid out as y."""
    B_mr = B.to(z_Nrp.dtype)
    if contiguous:
        return y_Nmp.baddbmm(B_mr.expand(len(z_Nrp), -1, -1), z_Nrp, alpha=scaling)
    B_rm = B_mr.t().expand(len(z_Nrp), -1, -1)
    return y_Nmp.mT.baddbmm(z_Nrp.mT, B_rm, alpha=scaling).mT


class _Mixed(torch.autograd.Function):
    """`_mixed` for a master B of a higher precision, in which its gradient is summed."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, B: Tensor, scaling: float, flat: bool) -> Tensor:
        ctx.save_for_backward(z, B)
        ctx.scaling = scaling
        return _mixed(y, z, B, scaling, flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (z_Nrp, B), dy_Nmp = ctx.saved_tensors, grads[0]
        dz_Nrp = dB = None
        if ctx.needs_input_grad[1]:
            dz_Nrp = (B.to(z_Nrp.dtype).t() @ dy_Nmp).mul_(ctx.scaling)
        if ctx.needs_input_grad[2]:
            dy_Tm, z_Tr = (t.mT.reshape(-1, t.shape[1]) for t in (dy_Nmp, z_Nrp))
            dB = summed(dy_Tm, z_Tr, B.dtype, ctx.scaling)
        return dy_Nmp, dz_Nrp, dB, None, None
