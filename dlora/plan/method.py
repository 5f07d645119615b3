"""What the adapters' method stores and sends beside A, B and the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dlora.lora.attach import attachment_of, named_adapters


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
    others, config = [0, 0, 0], attachment_of(skeleton).config
    for _, _, adapter in named_adapters(skeleton):
        planned = adapter.planned_state(config)
        own = (planned.summed, planned.summed_always, planned.working)
        others = [all_of + one for all_of, one in zip(others, own, strict=True)]
        for name, count in planned.copies.items():
            copies += [{} for _ in range(count - len(copies))]
            for named in copies[:count]:
                named[f"{adapter.place}.{name}"] = adapter.get_parameter(name)
    return MethodPlan(tuple(copies), *others)
