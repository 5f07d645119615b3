"""What a run took, for the comparison with its plan."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from dlora.lora.attach import trainable_parameters
from dlora.lora.names import attached
from dlora.sharding.engines.storage import held_bytes


@dataclass(frozen=True)
class Measured:
    """Bytes of one rank.

    Attributes:
        wire: sent per step once resident layers are gathered: the median from the third step on,
            as long as the method has cut no parameters.
        base: stored of W0.
        replica: of A, B, gradients and optimizer state.
        peak: the most, of the rank that had most.
        pruned: whether the method cut a part of `replica`, which is planned for the beginning.
    """

    wire: float
    base: int
    replica: int
    peak: int
    pruned: bool = False


class Stored(NamedTuple):
    """Bytes of W0, and of A, B, gradients and optimizer state, that a rank stores."""

    base: int
    replica: int


def stored(model: nn.Module, replica: Any, optimizer: Any) -> Stored:
    """What this rank stores now."""
    working = replica.method.working_bytes
    base = held_bytes(model) - _storage_bytes(_of_frozen_adapters(model))
    return Stored(base, _storage_bytes(_kept(replica, optimizer)) + working)


def measure(replica: Any, records: Sequence[Mapping[str, Any]], found: Stored) -> Measured:
    """The figures of a run that is over.

    Args:
        records: lines of the metrics, one for each step.
        found: what it stored.
    """
    steady, resized = records[2:] or records, replica.method.resized_after
    if resized is not None:
        steady = [r for r in steady if r["step"] <= resized] or steady
    return Measured(
        wire=statistics.median(record["wire_bytes"] for record in steady),
        base=found.base,
        replica=found.replica,
        peak=max(record["peak_memory_bytes"] for record in records),
        pruned=resized is not None,
    )


def _of_frozen_adapters(model: nn.Module) -> Iterable[Tensor]:
    """A and B of a teacher that shares W0."""
    for name, attachment in attached(model).items():
        if not attachment.trained:
            yield from trainable_parameters(model, name).values()


def _kept(replica: Any, optimizer: Any) -> Iterable[Tensor]:
    for parameter in (*replica.named.values(), *replica.optimized.values()):
        yield parameter.detach()
        if parameter.grad is not None:
            yield parameter.grad
    for slots in optimizer.state.values():
        yield from (value for value in slots.values() if isinstance(value, Tensor) and value.ndim)


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
