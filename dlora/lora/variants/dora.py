"""DoRA: W' = diag(μ/n)·(W0 + s·B·A), a trained magnitude μ [m] for each row's direction.

n is the row norm of W0 + s·B·A, a constant in backward; μ starts as that of W0, so that W' = W0.

Source: Liu et al. 2024, https://arxiv.org/abs/2402.09353.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dlora.lora import functional_dora
from dlora.lora.functional_convolution import Convolve
from dlora.lora.given import Given
from dlora.lora.step_values import made_anew
from dlora.lora.variants.lora import LoraAdapter
from dlora.quant.linear import Weight, product, whole


class DoraAdapter(LoraAdapter):
    """A, B and the magnitudes of one base module.

    Attributes:
        lora_magnitude_vector: μ [m], one for each output (of an embedding: for each column).
        base_squares: ‖W0_j‖² [m], frozen. Both are of no use before `see_weight`.
    """

    name = "dora"
    offered = False  # `adapter.use_dora` picks it
    needs_weight = True
    keeps_output = True
    rescales_rows = True

    base_squares: Tensor

    def __init__(self, *, m: int, dtype: torch.dtype, device: torch.device, **others: Any) -> None:
        super().__init__(m=m, dtype=dtype, device=device, **others)
        self.lora_magnitude_vector = nn.Parameter(torch.zeros(m, dtype=dtype, device=device))
        squares = torch.zeros(m, dtype=dtype, device=device)
        self.register_buffer("base_squares", squares, persistent=False)  # W0 is saved elsewhere

    @torch.no_grad()
    def see_weight(self, weight: Tensor) -> None:
        self.base_squares.copy_(functional_dora.row_squares(weight, self.base_squares.dtype))
        self.lora_magnitude_vector.copy_(self.base_squares.sqrt())

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        if (given := self.given) is not None:
            A, B, mask, norms = given.A, given.B, given.mask_of(x), given.norms
            assert given.magnitude is not None and norms is not None
            rows = functional_dora.Rows(given.magnitude, norms, made_anew, norms)
            return functional_dora.linear(x, weight, bias, A, B, self.scaling, rows, mask=mask)
        A, B = self.factors()
        mask = self.mask(x)
        return functional_dora.linear(x, weight, bias, A, B, self.scaling, self._rows, mask=mask)

    def linear_update(self, x: Tensor, weight: Weight) -> Tensor:
        return self.linear(x, weight, None) - product(x, weight, None)

    @torch.no_grad()
    def norms(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """n [m] of the rows of W0 + s·B·A, made once for all passes of a step."""
        A, B = self.factors()
        return self.shared_by_passes(
            "norms",
            lambda: functional_dora.row_norms(
                whole(weight, dtype), A, B, self.scaling, self.base_squares
            ),
        )

    def give(self, x: Tensor, weight: Weight, r: int, layer: Tensor) -> Given:
        given = super().give(x, weight, r, layer)
        return given.with_rows(self.lora_magnitude_vector, self.norms(weight, x.dtype))

    def embedding(self, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        A, B = self.factors()
        return functional_dora.embedding(ids, weight, A, B, self.scaling, self._rows, padding_idx)

    def convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, convolve: Convolve
    ) -> Tensor:
        A, B = self.factors()
        mask = self.mask(x, 1 - weight.ndim)
        return functional_dora.convolution(
            x, weight, bias, A, B, self.scaling, self._rows, convolve, mask=mask
        )

    def row_scale(self, norms: Tensor) -> Tensor:
        """μ/n; 0 for a row of zeros, whatever its magnitude."""
        magnitude = self.lora_magnitude_vector.detach().to(norms.dtype)
        return torch.where(norms > 0, magnitude / norms, 0)

    @property
    def _rows(self) -> functional_dora.Rows:
        return functional_dora.Rows(
            self.lora_magnitude_vector, self.base_squares, self.shared_by_passes
        )
