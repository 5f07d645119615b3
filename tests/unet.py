"""A small UNet-like model of one, two or three dimensions, as diffusion models are made of."""

from typing import Any

import torch
from causal_models import randomize
from torch import Tensor, nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
# Convolutions of every kind of kernel, stride and padding, the time embedding, and attention.
TARGETS = ["conv_in", "down", "mix", "conv_out", "time", "to_q", "to_v", "to_out"]
CHANNELS, SIZE, TIMES = 3, 6, 5


class Block(nn.Module):
    """A 1×1 convolution and self-attention over the places."""

    def __init__(self, dims: int, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.mix = CONVOLUTIONS[dims](width, width, 1)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(torch.tanh(self.norm(x)))
        tokens = x.flatten(2).mT
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        scores = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        return x + self.to_out(scores @ v).mT.reshape(x.shape)


class UNet(nn.Module):
    """Down, a middle that knows the time, up, and a skip around all of it."""

    def __init__(self, dims: int, width: int = 6) -> None:
        super().__init__()
        convolution: Any = CONVOLUTIONS[dims]
        self.conv_in = convolution(CHANNELS, width, 3, padding=1)
        self.down = convolution(width, 2 * width, 2, stride=2, padding="valid")
        self.time = nn.Linear(TIMES, 2 * width)
        self.blocks = nn.ModuleList(Block(dims, 2 * width) for _ in range(2))
        self.up = TRANSPOSED[dims](2 * width, width, 2, stride=2)
        self.conv_out = convolution(2 * width, CHANNELS, 3, padding="same", bias=False)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        skip = self.conv_in(x)
        x = self.down(torch.tanh(skip))
        x = x + self.time(times).view(*x.shape[:2], *(1 for _ in x.shape[2:]))
        for block in self.blocks:
            x = block(x)
        return self.conv_out(torch.cat([self.up(torch.tanh(x)), skip], dim=1))


def unet(dims: int = 2) -> UNet:
    """The same random weights at every call."""
    torch.manual_seed(0)
    model = UNet(dims)
    randomize(model)
    return model


def noisy(dims: int = 2, rows: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(x, times, target) of `rows` samples."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, CHANNELS, *(SIZE for _ in range(dims)))
    x, target = torch.randn(2, *shape, generator=generator)
    return x, torch.randn(rows, TIMES, generator=generator), target
