"""FLoRA: ΔW = s·𝒢 ×₁ P₁ ×₂ P₂ …, a small core 𝒢 with the topology of W0 and one factor per dim.

    linear       ΔW = s·P_out 𝒢ᵀ P_inᵀ
                 𝒢 [r_in, r_out], P_in [n, r_in], P_out [m, r_out]
    convolution  ΔW[o, i, x, …] = s·Σ 𝒢[a, b, p, …] P_in[i, a] P_out[o, b] K_x[x, p] …
                 𝒢 [r_in, r_out, r_x, …], P_in [c, r_in], P_out [m, r_out], K_x [k_x, r_x], …

P_inᵀ is `lora_A`, P_out `lora_B`, 𝒢 `lora_core` and the factors of the kernel `lora_K0`, `lora_K1`,
`lora_K2`. However large W0 is, 𝒢 and the K are small, so they are multiplied into P_in or P_out and
what is left is the product of two factors: the arithmetic is that of LoRA, and so is the export.

The scale is s = α/r with r = r_in (rsLoRA: α/√r), where the authors' code has a constant.

Source: Si et al. 2024, https://arxiv.org/abs/2405.14739; the start is that of the authors' code,
https://github.com/SJTU-DeepVisionLab/FLoRA.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dlora.errors import UsageError
from dlora.lora import functional
from dlora.lora.config import LoraConfig
from dlora.lora.init import Initialisation
from dlora.lora.variants.lora import LoraAdapter
from dlora.registry import option

_PLACES, _RANKS = "xyz", "pqs"  # letters of the kernel's dims in a formula


@dataclass(frozen=True)
class FloraConfig(LoraConfig):
    """Settings of FLoRA; `r` is r_in.

    Args:
        flora_r_out: r_out of every module; None: the module's r.
        flora_kernel_r: rank of each dim of a convolution's kernel, or the kernel's size where that
            is less; None: the kernel's size.

    Raises:
        UsageError: a rank is no positive integer.
    """

    method: ClassVar[str] = "flora"

    flora_r_out: int | None = option(None, "the core is r x flora_r_out; null: r x r", ge=1)
    flora_kernel_r: int | None = option(
        None, "rank of each dim of a convolution's kernel; null: its size", ge=1
    )

    def shapes_for(self, path: str, kernel: tuple[int, ...]) -> dict[str, Any]:
        r_out = self.flora_r_out or self.r_for(path)
        ranks = tuple(min(self.flora_kernel_r or size, size) for size in kernel)
        return {"r_out": r_out, "kernel": kernel, "kernel_r": ranks}

    def check_kernels(self, kernels: list[tuple[int, ...]]) -> None:
        wanted, largest = (
            self.flora_kernel_r,
            max((k for kernel in kernels for k in kernel), default=0),
        )
        if wanted is not None and wanted >= largest:
            why = f"no kernel is larger than {largest}" if largest else "no convolution is adapted"
            raise UsageError(f"flora_kernel_r: {wanted} cannot act: {why}")


class FloraAdapter(LoraAdapter):
    """P_in, P_out, the core and the factors of the kernel of one base module.

    Args:
        r: r_in; r_out: r_out.
        kernel, kernel_r: sizes of a convolution's kernel and the rank of each; empty for a product.
    """

    settings = FloraConfig
    name = "flora"
    unused = {"init_lora_weights": "flora starts with a core of zeros"}

    def __init__(
        self,
        *,
        m: int,
        n: int,
        r: int,
        r_out: int,
        kernel: tuple[int, ...],
        kernel_r: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        **others: Any,
    ) -> None:
        channels = n // math.prod(kernel)
        super().__init__(m=m, n=channels, r=r, dtype=dtype, device=device, **others)
        self.kernel, self.kernel_r = kernel, kernel_r

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        self.lora_B = parameter(m, r_out)
        self.lora_core = parameter(r, r_out, *kernel_r)
        for index, (size, rank) in enumerate(zip(kernel, kernel_r, strict=True)):
            self.register_parameter(f"lora_K{index}", parameter(size, rank))

    @torch.no_grad()
    def reset(self, *, is_embedding: bool, init: type[Initialisation]) -> None:
        """Start at ΔW = 0: the core is zero, each P and K ~ N(0, 1/2r) with r its own rank.

        Kaiming's rule for a slope of √3, with a factor's columns as what is summed over.
        """
        for factor in (self.lora_A.t(), self.lora_B, *self._kernel_factors()):
            nn.init.kaiming_normal_(factor, a=math.sqrt(3))
        self.lora_core.zero_()

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) with 𝒢, and for a convolution the K, multiplied into one of them.

        For a product that is the one that leaves the smaller rank, and of equal ranks the smaller
        one: (P_inᵀ, P_out 𝒢ᵀ) or (𝒢ᵀ P_inᵀ, P_out). For a convolution it is A [r_out, c·∏k].
        """
        r_in, r_out = self.lora_core.shape[:2]
        n, m = self.lora_A.shape[1], self.lora_B.shape[0]
        with _of_masters(self.lora_core):
            if self.kernel:
                return self._unfolded(), self.lora_B
            if (r_in, m) <= (r_out, n):
                return self.lora_A, self.lora_B @ self.lora_core.t()
            return self.lora_core.t() @ self.lora_A, self.lora_B

    def embedding(self, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        """As for LoRA; the core goes into B whatever the ranks, since A has a column per row."""
        with _of_masters(self.lora_core):
            B = self.lora_B @ self.lora_core.t()
        return functional.embedding(ids, weight, self.lora_A, B, self.scaling, padding_idx)

    def _unfolded(self) -> Tensor:
        """Σ 𝒢[a, b, p, …] P_in[i, a] K_x[x, p] … as [r_out, c·∏k]."""
        places, ranks = _PLACES[: len(self.kernel)], _RANKS[: len(self.kernel)]
        terms = [f"ab{ranks}", "ai", *map("".join, zip(places, ranks, strict=True))]
        formula = f"{','.join(terms)}->bi{places}"
        A = torch.einsum(formula, self.lora_core, self.lora_A, *self._kernel_factors())
        return A.flatten(1)

    def _kernel_factors(self) -> list[Tensor]:
        return [self.get_parameter(f"lora_K{index}") for index in range(len(self.kernel))]


def _of_masters(core: Tensor) -> AbstractContextManager:
    """Autocast off, so that products of masters keep their dtype; the meta device has none."""
    return nullcontext() if core.is_meta else torch.autocast(core.device.type, enabled=False)
