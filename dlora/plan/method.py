"""What the adapters' method stores and sends beside A, B and the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from dlora.lora.attach import attachment_of, named_adapters
from dlora.lora.config import LoraConfig
from dlora.lora.names import attached, by_name
from dlora.lora.variants import LoraAdapter


@dataclass(frozen=True)
class MethodPlan:
    """The sum over all adapters.

    Attributes:
        copies: one entry for each tensor that is stored of every parameter in it, by name.
        summed, summed_always, working: as of `PlannedState`.
    """

    copies: tuple[dict[str, nn.Parameter], ...] = ()
    summed: int = 0
    summed_always: int = 0
    working: int = 0


def method_plan(skeleton: nn.Module) -> MethodPlan:
    """The sum of what the adapter classes declare; see `LoraAdapter.planned_state`."""
    copies: list[dict[str, nn.Parameter]] = []
    others = [0, 0, 0]
    for adapter, config in _every_adapter(skeleton):
        planned = adapter.planned_state(config)
        own = (planned.summed, planned.summed_always, planned.working)
        others = [all_of + one for all_of, one in zip(others, own, strict=True)]
        for name, count in planned.copies.items():
            copies += [{} for _ in range(count - len(copies))]
            for named in copies[:count]:
                named[f"{adapter.place}.{name}"] = adapter.get_parameter(name)
    return MethodPlan(tuple(copies), *others)


def offset_bytes(skeleton: nn.Module) -> int:
    """Bytes of the frozen factors of all adapters' offsets."""
    return sum(tensor.nbytes for tensor in offsets_of(skeleton))


def offsets_of(skeleton: nn.Module) -> list[Tensor]:
    """The frozen factors of all adapters."""
    every = (adapter.offsets().values() for adapter, _ in _every_adapter(skeleton))
    return [tensor for own in every for tensor in own]


def _every_adapter(skeleton: nn.Module) -> Iterator[tuple[LoraAdapter, LoraConfig]]:
    """The adapters of all names, with their settings."""
    for name in attached(skeleton):
        with by_name(skeleton, name):
            for _, _, adapter in named_adapters(skeleton):
                yield adapter, attachment_of(skeleton).config
