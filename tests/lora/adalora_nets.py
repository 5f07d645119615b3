"""A small net with AdaLoRA by dlora and by PEFT, side by side."""

import copy
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

from dlora import AdaLoraConfig, attach, shard
from dlora.lora.attach import named_adapters
from dlora.methods.trained_replica import TrainedReplica

LAYERS = ("l1", "l2", "l3")


class Net(nn.Module):
    """Three layers of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.l1, self.l2, self.l3 = nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.l3(torch.tanh(self.l2(torch.tanh(self.l1(x)))))


def net(dtype: torch.dtype = torch.float32) -> Net:
    """The same weights at every call."""
    torch.manual_seed(0)
    return Net().to(dtype)


def adapted(model: nn.Module | None = None, **settings: Any) -> nn.Module:
    """A net with AdaLoRA; by default r₀ = 6, 3 of 6 at the end."""
    given = {"init_r": 6, "target_r": 3, "lora_alpha": 12, "target_modules": list(LAYERS)}
    model = net() if model is None else model
    torch.manual_seed(3)
    attach(model, AdaLoraConfig(**given | settings))
    return model


@torch.no_grad()
def randomize(model: nn.Module, std: float = 0.5) -> nn.Module:
    """λ, P and Q away from where they start."""
    generator = torch.Generator().manual_seed(7)
    for _, _, adapter in named_adapters(model):
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * std)
    return model


def data(step: int, dtype: torch.dtype = torch.float32, rows: int = 16) -> tuple[Tensor, Tensor]:
    """(x, y) of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(rows, 16, generator=generator, dtype=torch.float64)
    y = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def mse(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x, y = data(step, dtype)
    return (model(x) - y).square().mean()


@dataclass
class Ours:
    """A loop of one's own: what a user writes."""

    model: nn.Module
    replica: TrainedReplica
    optimizer: torch.optim.Optimizer

    @classmethod
    def start(cls, model: nn.Module, lr: float = 1e-2, **options: Any) -> "Ours":
        replica = shard(model)
        optimizer = torch.optim.AdamW(replica.parameter_groups(lr=lr), **options)
        return cls(model, replica, optimizer)

    def step(self, loss: Tensor) -> None:
        loss.backward()
        self.replica.reduce_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self) -> dict[str, Tensor]:
        """The λ of each module."""
        return {path: a.lora_E.detach().view(-1) for path, _, a in named_adapters(self.model)}


def peft_adalora(model: nn.Module, ours: nn.Module, **settings: Any) -> peft.PeftModel:
    """PEFT's AdaLoRA on `model`, starting where `ours` stands.

    PEFT divides lora_alpha by init_r + 1e-5, so it gets a lora_alpha for which that is dlora's s.
    """
    config = ours.dlora.config
    names = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "total_step", "orth_reg_weight")
    given = {name: getattr(config, name) for name in names}
    given["lora_alpha"] = config.lora_alpha * (config.init_r + 1e-5) / config.init_r
    given["target_modules"] = config.target_modules
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.AdaLoraConfig(**given | settings))
    with torch.no_grad():
        for path, _, adapter in named_adapters(ours):
            layer = theirs.base_model.model.get_submodule(path)
            for name, parameter in adapter.named_parameters():
                own = getattr(layer, name)["default"]
                own.data = parameter.detach().clone()
            layer.ranknum["default"].data = layer.ranknum["default"].to(parameter.dtype)
    return theirs


def peft_layers(theirs: peft.PeftModel, ours: nn.Module) -> dict[str, nn.Module]:
    """PEFT's layers by the paths that dlora has for them."""
    return {
        path: theirs.base_model.model.get_submodule(path) for path, _, _ in named_adapters(ours)
    }


def orthogonality(factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean over all P and Q of ‖PᵀP − I‖_F."""
    grams = [gram for A, B in factors for gram in (A @ A.T, B.T @ B)]
    norms = [torch.linalg.matrix_norm(g - torch.eye(len(g), dtype=g.dtype)) for g in grams]
    return torch.stack(norms).mean()


def regulariser(layers: dict[str, nn.Module], kept: dict[str, Tensor] | None = None) -> Tensor:
    """Of PEFT's layers, and of the triplets that are kept."""
    factors = {p: (layer.lora_A["default"], layer.lora_B["default"]) for p, layer in layers.items()}
    if kept is not None:
        factors = {path: (A[kept[path]], B[:, kept[path]]) for path, (A, B) in factors.items()}
    return orthogonality([*factors.values()])


def kept_of(run: Ours) -> dict[str, list[int]]:
    """The triplets of each module that the last mask left."""
    return run.replica.method.record()["kept"]
