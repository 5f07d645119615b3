"""A class that calls a module once for each position is refused under ZeRO-3, and only there."""

import torch
from refusals import refusal
from torch import Tensor, nn
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextQSAIndexer

from dlora.base.repeated_calls import _called_in_loops, calls_by_length
from dlora.base.skeleton import check_divides
from dlora.sharding.topology import Placement, Topology, resolve_placement


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.layers = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        _, length, _ = x.shape
        for layer in range(len(self.layers)):
            x = self.layers[layer](x)
        return torch.stack([self.step(x, t) for t in range(length)])

    def step(self, x: Tensor, t: int) -> Tensor:
        return self.cell(x[:, t])


class Looping(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        for t in range(x.shape[1]):
            x[:, t] = self.cell(x[:, t])
        return x


def placement(engine: str) -> Placement:
    return resolve_placement(engine, "world", Topology(rank=0, world=2, ranks_per_node=2))


def test_only_a_loop_over_a_tensor_s_size_counts() -> None:
    assert calls_by_length(nn.Sequential(Looping())) == {"0.cell": "Looping"}
    assert calls_by_length(Recurrent()) == {}
    assert _called_in_loops(Qwen4ExpTextQSAIndexer) == {"k_layernorm"}


def test_zero3_refuses_it_by_name() -> None:
    said = refusal(check_divides, Looping(), placement("zero3"))
    assert "sharding.engine: zero3: Looping calls cell once for each position" in said
