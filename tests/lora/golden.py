"""The golden example of methods.md, section 18: exact rationals, not results of this code."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlora import LoraConfig, attach

W0 = [[1, 0, -1, 2, 0.5], [0, 1, 0, -1, 1], [0.5, -0.5, 1, 0, 0], [1.5, 0, 0, 1, -0.5]]
A = [[0.2, -0.1, 0, 0.3, -0.2], [0, 0.1, 0.4, -0.2, 0.1]]
B = [[0.5, 0.1], [-0.3, 0.2], [0, -0.4], [0.2, 0.3]]
X = [1, -1, 0.5, 0, 2]
Y = [1.34, 1.72, 0.54, 1.06]
MERGED = [
    [1.8, -0.32, -0.68, 3.04, -0.22],
    [-0.48, 1.4, 0.64, -2.04, 1.64],
    [0.5, -0.82, -0.28, 0.64, -0.32],
    [1.82, 0.08, 0.96, 1, -0.58],
]
HALF_SQUARE = {  # gradients of ½‖y‖²
    "lora_A": [[2.928, -2.928, 1.464, 0, 5.856], [4.64, -4.64, 2.32, 0, 9.28]],
    "lora_B": [[-1.072, 3.216], [-1.376, 4.128], [-0.432, 1.296], [-0.848, 2.544]],
}


def layer(stored: str, dtype: torch.dtype, **settings: object) -> nn.Sequential:
    """The example's W0 in a Linear or, transposed, in a Conv1D; its A and B attached."""
    base = nn.Linear(5, 4, bias=False) if stored == "linear" else Conv1D(4, 5)
    model = nn.Sequential(base).to(dtype)
    weight = torch.tensor(W0, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(weight if stored == "linear" else weight.T)
        if stored == "conv1d":
            base.bias.zero_()
        attach(model, LoraConfig(r=2, lora_alpha=16, **settings))
        base.adapter.lora_A.copy_(torch.tensor(A, dtype=dtype))
        base.adapter.lora_B.copy_(torch.tensor(B, dtype=dtype))
    return model


def assert_is(value: Tensor, expected: list, tolerance: float) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert (value.double() - wanted).abs().max() <= tolerance * wanted.abs().max(), value
