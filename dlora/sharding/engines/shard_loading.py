"""Reading a base element by element: each rank its own part of every parameter, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from dlora.sharding.engines.protocol import Weights

Slot = tuple[str, nn.Module, str]  # name in the model, module, name in the module
Place = Callable[[nn.Parameter], tuple[nn.Parameter, int, Tensor]]


def slots_of(model: nn.Module) -> list[list[Slot]]:
    """Where each parameter stands; a tied one stands in several places."""
    slots: dict[int, list[Slot]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            slot = (f"{path}.{name}" if path else name, module, name)
            slots.setdefault(id(parameter), []).append(slot)
    return list(slots.values())


def fill(slots: Iterable[list[Slot]], weights: Weights, place: Place) -> None:
    """Put parameters with values in the place of those on the meta device, one after another.

    Args:
        place: makes the parameter for one on the meta device; also tells where in its flattened
            elements this rank's part begins, and the part [n], which is filled.
    """
    for same in slots:
        name, module, own_name = same[0]
        parameter, start, part = place(module.get_parameter(own_name))
        if part.numel():
            weights.read(name, start, part)
        for _, owner, its_name in same:
            owner.register_parameter(its_name, parameter)
