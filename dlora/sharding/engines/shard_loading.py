"""Reading a base element by element: each rank its own part of every parameter, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from dlora.sharding.engines.protocol import Weights

Slot = tuple[str, nn.Module, str]  # name in the model, module, name in the module
MakeShard = Callable[[nn.Parameter], tuple[nn.Parameter, int, Tensor]]


def slots_of(model: nn.Module) -> list[list[Slot]]:
    """The modules that have each parameter; a tied one has several."""
    slots: dict[int, list[Slot]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            slot = (f"{path}.{name}" if path else name, module, name)
            slots.setdefault(id(parameter), []).append(slot)
    return list(slots.values())


def fill(slots: Iterable[list[Slot]], weights: Weights, make_shard: MakeShard) -> None:
    """Replace parameters on the meta device by ones with values, one after another.

    Args:
        make_shard: returns, for a parameter on the meta device, the parameter that replaces it,
            the index in its flattened elements where this rank's part begins, and that part [n],
            which is filled.
    """
    for same in slots:
        name, module, own_name = same[0]
        parameter, start, part = make_shard(module.get_parameter(own_name))
        if part.numel():
            weights.read(name, start, part)
        for _, owner, its_name in same:
            owner.register_parameter(its_name, parameter)
