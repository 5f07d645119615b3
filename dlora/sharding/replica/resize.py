"""Parameters that keep only some rows or columns, and the optimizer state of these."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlora.sharding.comm_bytes import ring_gather_bytes
from dlora.sharding.replica.hierarchical_reduce import Reduction
from dlora.sharding.replica.optimizer_state import Named, StateDevices, StateStrategy, states_of

Cuts = Mapping[str, tuple[int, Tensor]]  # by name: a dim, and the indices along it that stay


def cut_values(named: Named, cuts: Cuts) -> dict[str, Tensor]:
    """The rows or columns that stay of the parameters that are cut, in storage of their own."""
    return {name: named[name].detach().index_select(*cut) for name, cut in cuts.items()}


def cut_states(
    strategy: StateStrategy,
    reduction: Reduction,
    named: Named,
    cuts: Cuts,
    optimizer: Optimizer,
) -> list[tuple[str, str, Tensor | None]]:
    """(name, slot, this rank's part after the cut) of an optimizer's state.

    Collective where the state is divided: tensors move to other ranks, one whole one at a time.
    """
    after = {
        name: nn.Parameter(_cut(parameter.detach().to("meta"), cuts.get(name)))
        for name, parameter in named.items()
    }
    future = type(strategy)(after, reduction)
    states: list[tuple[str, str, Tensor | None]] = []
    for name, slot, whole in strategy.gather_full(
        states_of(optimizer, strategy.optimized), everywhere=True
    ):
        if strategy.collective_saves:
            reduction.wire.add(ring_gather_bytes(whole.nbytes, reduction.topology.world))
        if whole.shape == named[name].shape:
            whole = _cut(whole, cuts.get(name))
        part = future.local_part(name, whole)
        states.append((name, slot, None if part is None else part.clone()))
    return states


def put_states(
    states: list[tuple[str, str, Tensor | None]], optimizer: Optimizer, optimized: Named
) -> None:
    """Give an optimizer the states that `cut_states` made."""
    devices = StateDevices(optimizer)
    for name, slot, part in states:
        parameter = optimized[name]
        slots = optimizer.state[parameter]
        slots.pop(slot, None)
        if part is not None:
            slots[slot] = part.to(devices.of(parameter, part))


def replace_data(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter's data to one of another shape.

    Autograd remembers the shape of a leaf for as long as any graph through it is alive (a loop's
    last `loss` is enough) and would refuse gradients of the new one. It forgets when the dtype
    changes.
    """
    parameter.grad = None
    other = torch.float16 if value.dtype != torch.float16 else torch.float32
    parameter.data = value.new_empty(0, dtype=other)
    parameter.data = value


def _cut(tensor: Tensor, cut: tuple[int, Tensor] | None) -> Tensor:
    if cut is None:
        return tensor
    dim, indices = cut
    return torch.index_select(tensor, dim, indices.to(tensor.device))
