"""What the optimizer stores, and what it sends beside the gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dlora.config.load import OptimizerConfig
from dlora.optim.eight_bit import MAP_BYTES, state_bytes
from dlora.optim.lora_pro import Pair, pair_cost
from dlora.plan.workload import Workload
from dlora.registry import room
from dlora.sharding.replica.optimizer_state import StateStrategy, count, item
from dlora.sharding.replica.owned_state import gather_bytes, gathered_elements, owners
from dlora.sharding.replica.replica import strategy_class
from dlora.sharding.topology import Topology

_SCRATCH = 4  # tensors of the size of one W at a time, where the moments have that


@dataclass(frozen=True)
class State:
    """Bytes of an optimizer's state.

    Attributes:
        held: on the rank that has most.
        whole: all of it, once.
        stepping: most that a step takes beside it.
        wire: ring-equivalent bytes that a rank sends per step, beside the reduction.
    """

    held: int
    whole: int
    stepping: int = 0
    wire: float = 0.0


def modes(workload: Workload, setting: str, ranks: int) -> list[bool]:
    """The values of `divided` to try, in order, for a `setting` of `sharding.optimizer_state`."""
    if setting != "auto":
        return [setting == "divided"]
    divides = _rule(workload.optimizer)["divides"]
    if ranks == 1 or divides == "nothing" or workload.optimizers:  # those of several are whole
        return [False]
    return [True] if divides == "pairs" else [False, True]


def share_of(optimizer: OptimizerConfig, divided: bool) -> type[StateStrategy]:
    """The strategy of the gradients; LoRA-Pro divides its state by pairs, not the gradients."""
    return strategy_class(divided and divides(optimizer) != "pairs")


def state_of(
    optimizer: OptimizerConfig,
    trained: Mapping[str, nn.Parameter],
    topology: Topology,
    divided: bool,
) -> State:
    """The state for A, B and trained copies, by name."""
    if divides(optimizer) == "nothing":
        held = sum(state_bytes(p.numel()) for p in trained.values())
        return State(held + MAP_BYTES, held + MAP_BYTES * len(trained))
    if divides(optimizer) == "pairs":
        return _of_pairs(optimizer.lora_pro_moments, trained, topology, divided)
    each = _rule(optimizer)["moments"] * item(trained)
    elements = strategy_class(divided).elements(trained, topology)
    return State(each * elements, each * count(trained))


def divides(optimizer: OptimizerConfig) -> str:
    """What of the optimizer's state is distributed over ranks; see `dlora.optim.rule.Rule`."""
    return str(_rule(optimizer)["divides"])


def _rule(optimizer: OptimizerConfig) -> Mapping[str, Any]:
    """The attributes that the optimizer's file declares."""
    return room("optim")[optimizer.name].says


def _of_pairs(
    moments: str, trained: Mapping[str, nn.Parameter], topology: Topology, divided: bool
) -> State:
    pairs, rest = _pairs(trained)
    size = item(trained)
    numels = [pair.A.numel() + pair.B.numel() for pair in pairs]
    wholes = [pair.sizes[0] * pair.sizes[1] for pair in pairs]
    kept = wholes if moments == "full" else numels
    ranks = topology.world if divided else 1
    chosen = owners([pair_cost(*pair.sizes, moments) for pair in pairs], ranks)
    most = max(sum(k for k, r in zip(kept, chosen, strict=True) if r == n) for n in range(ranks))
    staging = gathered_elements(numels, chosen, topology) if divided else 0
    scratch = _SCRATCH * max(wholes, default=0) if moments == "full" else 0
    return State(
        held=2 * size * (most + rest),
        whole=2 * size * (sum(kept) + rest),
        stepping=size * (staging + scratch),
        wire=gather_bytes(size * staging, topology),
    )


def _pairs(trained: Mapping[str, nn.Parameter]) -> tuple[Sequence[Pair], int]:
    """A and B that belong together, by their names, and the number of elements of all others."""
    pairs = []
    for name, parameter in trained.items():
        head, _, last = name.rpartition(".")
        if last == "lora_A":
            pairs.append(Pair(parameter, trained[f"{head}.lora_B"], 1.0))
    rest = count(trained) - sum(pair.A.numel() + pair.B.numel() for pair in pairs)
    return pairs, rest
