"""Parameter groups: LoRA+ gives B its own learning rate.

LoRA+: lr_A = η, lr_B = λη (Hayou et al. 2024, https://arxiv.org/abs/2402.12354). FLoRA's core is
on B's side: it is what starts at zero, and it sums over r numbers, not n. Unlike PEFT's helper,
weight decay is honoured, and magnitudes, biases and whole trained modules stay at η.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

B_FACTORS = ("lora_B", "lora_core")


def parameter_groups(
    named: Mapping[str, nn.Parameter],
    *,
    lr: float,
    loraplus_lr_ratio: float = 1.0,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, none of them empty, every parameter in exactly one.

    Args:
        named: parameters by name; B factors are those whose last name is in `B_FACTORS`.
        lr: η.
        loraplus_lr_ratio: λ ≥ 1; 1 gives a single group.
        weight_decay: decoupled weight decay of every matrix; vectors (norms, biases) get none.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        is_b = name.rpartition(".")[2] in B_FACTORS
        rate = lr * loraplus_lr_ratio if is_b else lr
        decay = weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
