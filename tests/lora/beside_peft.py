"""Steps of AdamW beside PEFT's LoRA, in float64: outputs, every gradient, every A and B."""

from collections.abc import Callable
from typing import Any

import torch
from causal_models import relative_error
from torch import Tensor, nn

from dlora.lora.attach import trainable_parameters

TOLERANCE = 1e-9
ROUNDING = 1e-14  # a gradient below this share of the largest one is none


def names_in_peft(model: nn.Module) -> dict[str, str]:
    """Our name of each trainable parameter → PEFT's."""
    renamed = {}
    for name in trainable_parameters(model):
        path, _, factor = name.partition(".adapter.")
        if factor == "lora_magnitude_vector":
            renamed[name] = f"base_model.model.{path}.{factor}.default.weight"
        elif factor not in ("lora_A", "lora_B"):  # a trained copy
            renamed[name] = f"base_model.model.{path}.modules_to_save.default.{factor}"
        elif isinstance(model.get_submodule(path), nn.Embedding):
            renamed[name] = f"base_model.model.{path}.{factor.replace('_', '_embedding_')}.default"
        else:
            renamed[name] = f"base_model.model.{path}.{factor}.default.weight"
    return renamed


def check_steps(
    ours: nn.Module,
    theirs: nn.Module,
    steps: int,
    run: Callable[[Any, int], tuple[Tensor, Tensor]],
    lr: float,
) -> None:
    """Steps of both, which start alike; `run(model, step)` gives an output and its loss."""
    names, reference = names_in_peft(ours), dict(theirs.named_parameters())
    trained = trainable_parameters(ours)
    assert {n for n, p in reference.items() if p.requires_grad} == set(names.values())
    pairs = {name: (p, reference[names[name]]) for name, p in trained.items()}
    start = {name: p.detach().clone() for name, p in trained.items()}
    optimizers = [
        torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
        for parameters in zip(*pairs.values(), strict=True)
    ]
    for step in range(steps):
        outputs = [run(model, step) for model in (ours, theirs)]
        assert relative_error(outputs[0][0], outputs[1][0]) < TOLERANCE, step
        for _, loss in outputs:
            loss.backward()
        largest = max(other.grad.norm() for _, other in pairs.values())
        for name, (own, other) in pairs.items():
            gradient = other.grad.view_as(own)
            if max(own.grad.norm(), gradient.norm()) < ROUNDING * largest:  # 0 on paper, as that of
                own.grad.zero_()  # a bias before a softmax; AdamW would divide it by itself
                gradient.zero_()
                continue
            assert relative_error(own.grad, gradient) < TOLERANCE, (step, name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, (own, other) in pairs.items():
        assert relative_error(own, other.view_as(own)) < TOLERANCE, name
        assert not torch.equal(own, start[name]), name
