"""Where the state of an optimizer lies on CUDA, after a resume and after a cut.

The reference is where torch's own first step puts it.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import fake_cuda
from torch import nn

from dlora.checkpoint.host_copy import restore
from dlora.sharding.replica.replica import Replica
from dlora.sharding.replica.resize import put_states
from dlora.sharding.topology import Topology

SHAPES = {"A": (4, 3), "B": (5, 4)}
CUT = {"A": 0, "B": 1}  # the dim of two triplets that stay
Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "adamw unfused": torch.optim.AdamW,
    "adamw capturable": functools.partial(torch.optim.AdamW, capturable=True),
    "sgd with momentum": functools.partial(torch.optim.SGD, momentum=0.9),
}


def stepped(device: torch.device, make: Make, divided: bool) -> tuple[Replica, Any]:
    replica = Replica(Topology(0, 1, 1), divided=divided)
    replica.own({name: nn.Parameter(torch.empty(s, device=device)) for name, s in SHAPES.items()})
    optimizer = make(list(replica.optimized.values()))
    one_step(replica, optimizer)
    return replica, replica.attach_optimizer(optimizer)


def one_step(replica: Replica, optimizer: Any) -> None:
    for part in replica.optimized.values():
        part.grad = torch.zeros_like(part)
    optimizer.step()


def devices(replica: Replica, optimizer: Any) -> dict[tuple[str, str], str]:
    return {
        (name, slot): state.device.type
        for name, part in replica.optimized.items()
        for slot, state in optimizer.state[part].items()
        if isinstance(state, torch.Tensor)
    }


@pytest.mark.parametrize("divided", [False, True], ids=["whole", "divided"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_a_resume(name: str, divided: bool) -> None:
    with fake_cuda() as cuda:
        replica, optimizer = stepped(cuda, OPTIMIZERS[name], divided)
        wanted = devices(replica, optimizer)
        assert "cuda" in wanted.values()
        parts = {name: optimizer.state[part] for name, part in replica.optimized.items()}
        saved = [
            (f"{tensor}.{slot}", torch.zeros(SHAPES[tensor] if state.ndim else ()))
            for tensor, slots in parts.items()
            for slot, state in slots.items()
            if isinstance(state, torch.Tensor)
        ]
        optimizer.state.clear()
        restore([], saved, replica, optimizer)
        assert devices(replica, optimizer) == wanted


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_a_cut(name: str) -> None:
    with fake_cuda() as cuda:
        replica, optimizer = stepped(cuda, OPTIMIZERS[name], divided=False)
        wanted = devices(replica, optimizer)
        stay = torch.zeros(2, dtype=torch.int64, device=cuda)
        replica.resize({name: (dim, stay) for name, dim in CUT.items()}, optimizer)
        assert devices(replica, optimizer) == wanted


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_a_cut_of_what_is_divided(name: str) -> None:
    """Counts of steps come from other ranks through the CPU."""
    with fake_cuda() as cuda:
        replica, optimizer = stepped(cuda, OPTIMIZERS[name], divided=True)
        wanted = devices(replica, optimizer)
        received = [
            (tensor, slot, state.clone() if state.ndim else torch.zeros(()))
            for tensor, part in replica.optimized.items()
            for slot, state in optimizer.state[part].items()
            if isinstance(state, torch.Tensor)
        ]
        put_states(received, optimizer, replica.optimized)
        assert devices(replica, optimizer) == wanted
