"""What AdaLoRA's scorer adds: averages for each element, and scores on the wire at a mask."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from dlora.lora.variants.adalora import TRIPLET_DIM
from dlora.sharding.replica.hierarchical_reduce import padded, reduction_bytes
from dlora.sharding.replica.optimizer_state import item
from dlora.sharding.topology import Topology


def is_triplet_factor(name: str) -> bool:
    """Whether a trained parameter is one of P, E and Q."""
    return name.rpartition(".")[2] in TRIPLET_DIM


def score_bytes(trained: Mapping[str, nn.Parameter], topology: Topology) -> float:
    """Ring-equivalent bytes that a rank sends in the one sum of all scores; 0 without triplets."""
    triplets = sum(p.numel() for name, p in trained.items() if name.endswith(".lora_E"))
    return (
        reduction_bytes(padded(triplets, topology) * item(trained), topology) if triplets else 0.0
    )
