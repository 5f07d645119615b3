"""LoRA: ΔW = s·B·A with A [r, n], B [m, r], s = α/r (rsLoRA: α/√r).

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; rsLoRA, https://arxiv.org/abs/2312.03732.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dlora.lora import functional
from dlora.lora.dropout import DropoutStream
from dlora.quant.packed import Weight


class LoraAdapter(nn.Module):
    """A and B of one base module. A child that is never called: its host asks it for the product.

    Being never called keeps it out of every wrapper that hooks `forward` (FSDP2, ZeRO-3), so A and
    B stay whole plain tensors whatever happens to the base.

    Args:
        m, n: rows and columns of the host's weight seen as [out, in]; for an embedding, the width
            of a row and the number of rows.
        path: the host's path in the model; keys the dropout masks.
        dtype: of the masters A and B, float32 or float64.
    """

    def __init__(
        self,
        *,
        m: int,
        n: int,
        r: int,
        scaling: float,
        dropout: float,
        path: str,
        stream: DropoutStream,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, n, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(m, r, dtype=dtype, device=device))
        self.r, self.scaling, self.dropout, self.path = r, scaling, dropout, path
        self.stream = stream
        self.enabled = True

    @torch.no_grad()
    def reset(self, *, is_embedding: bool) -> None:
        """Start at ΔW = 0. Linear: A ~ U(−1/√n, 1/√n), B = 0. Embedding: A = 0, B ~ N(0, 1)."""
        if is_embedding:
            self.lora_A.zero_()
            self.lora_B.normal_()
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            self.lora_B.zero_()

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """x [..., n], weight [m, n], packed or not → y [..., m]."""
        keep, keep_scale = None, 1.0
        if self.training and self.dropout > 0:
            keep = self.stream.keep_mask(x, self.dropout, self.path)
            keep_scale = 1 / (1 - self.dropout)
        return functional.linear(
            x, weight, bias, self.lora_A, self.lora_B, self.scaling, keep, keep_scale
        )

    def embedding(self, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        """ids [...], weight [V, m] → y [..., m]. Dropout does not apply to a look-up (as PEFT)."""
        return functional.embedding(
            ids, weight, self.lora_A, self.lora_B, self.scaling, padding_idx
        )

    def delta(self) -> Tensor:
        """ΔW = s·B·A [m, n] in the masters' dtype."""
        return (self.lora_B.detach() @ self.lora_A.detach()) * self.scaling

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}"
