"""Products with masters of a higher precision than x, whose gradients are summed in theirs.

    y = f(x, M rounded to the dtype of x)       dx = ∂f/∂x · dy       dM = Σ ∂f/∂M · dy in M's dtype

f is linear in both: a convolution, or a product of matrices. Autograd's own gradient of the rounded
M would be rounded as well, once more in every micro-batch. `dlora.lora.functional.summed` is the
same for the layers that are one product; here f is the module's own, so autograd differentiates it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Product = Callable[[Tensor, Tensor], Tensor]  # (x, M) → y


def by_master(x: Tensor, master: Tensor, product: Product) -> Tensor:
    """`product(x, master)` in the dtype of x.

    A graph of torch's compiler has the plain product, whose gradient is rounded to that dtype.
    """
    if master.dtype == x.dtype or torch.compiler.is_compiling():
        return product(x, master.to(x.dtype))
    return _ByMaster.apply(x, master, product)


class _ByMaster(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, master: Tensor, product: Product) -> Tensor:
        ctx.save_for_backward(x, master)
        ctx.product = product
        return product(x, master.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, master = ctx.saved_tensors
        dx = dmaster = None
        if ctx.needs_input_grad[0]:
            rounded = master.to(x.dtype)
            dx = _gradient(lambda given: ctx.product(given, rounded), x, grads[0])
        if ctx.needs_input_grad[1]:
            wide = x.to(master.dtype)
            dy = grads[0].to(master.dtype)
            dmaster = _gradient(lambda given: ctx.product(wide, given), master, dy)
        return dx, dmaster, None


def _gradient(function: Callable[[Tensor], Tensor], at: Tensor, dy: Tensor) -> Tensor:
    """dy · ∂function/∂at."""
    with torch.enable_grad():
        given = at.detach().requires_grad_()
        return torch.autograd.grad(function(given), given, dy)[0]
