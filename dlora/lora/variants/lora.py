"""LoRA: ΔW = s·B·A with A [r, n], B [m, r], s = α/r (rsLoRA: α/√r).

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; rsLoRA, https://arxiv.org/abs/2312.03732.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dlora.lora import functional
from dlora.lora.config import LoraConfig
from dlora.lora.dropout import DropoutStream
from dlora.quant.packed import Weight


class PlainLora(NamedTuple):
    """What any adapter comes down to: ΔW = scaling·B·A with A [r, n], B [m, r]; r may be 0."""

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def r(self) -> int:
        """Its LoRA rank."""
        return self.A.shape[0]


class LoraAdapter(nn.Module):
    """A and B of one base module. A child that is never called: its host asks it for the product.

    Being never called keeps it out of every wrapper that hooks `forward` (FSDP2, ZeRO-3), so A and
    B stay whole plain tensors whatever happens to the base. Variants derive from it.

    Args:
        m, n: rows and columns of the host's weight seen as [out, in]; for an embedding, the width
            of a row and the number of rows.
        path: the host's path in the model; keys the dropout masks.
        dtype: of the masters A and B, float32 or float64.
    """

    settings: ClassVar[type[LoraConfig]] = LoraConfig

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
        self.scaling, self.dropout, self.path = scaling, dropout, path
        self.stream = stream
        self.enabled = True

    @property
    def r(self) -> int:
        """The LoRA rank."""
        return self.lora_A.shape[0]

    def singular_values(self) -> Tensor | None:
        """E [r, 1] that B is scaled with column by column; None for ones."""
        return None

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
            x,
            weight,
            bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            E=self.singular_values(),
            keep=keep,
            keep_scale=keep_scale,
        )

    def embedding(self, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        """ids [...], weight [V, m] → y [..., m]. Dropout does not apply to a look-up (as PEFT)."""
        A, B, E = self.lora_A, self.lora_B, self.singular_values()
        return functional.embedding(ids, weight, A, B, self.scaling, padding_idx, E=E)

    def as_lora(self) -> PlainLora:
        """The plain LoRA of the same ΔW; shares storage with this adapter where it can."""
        return PlainLora(self.lora_A.detach(), self.lora_B.detach(), self.scaling)

    def delta(self) -> Tensor:
        """ΔW = s·B·A [m, n] in the masters' dtype."""
        A, B, scaling = self.as_lora()
        return (B @ A) * scaling

    def extra_repr(self) -> str:
        factor = self._parameters.get("lora_A")  # ZeRO-3 takes it out of sight while it looks
        shown = "" if factor is None else f"r={factor.shape[0]}, "
        return f"{shown}scaling={self.scaling:g}, dropout={self.dropout:g}"
