"""How many copies a save makes from a GPU to the host, and that they are what one at a time are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_cuda import fake_cuda
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dlora.checkpoint.device_copy import STAGING_BYTES
from dlora.checkpoint.host_copy import capture
from dlora.sharding.replica.optimizer_state import states_of
from dlora.sharding.replica.replica import Replica
from dlora.sharding.topology import Topology

LAYERS = 64
MANY: dict[str, tuple[int, ...]] = {
    f"{layer}.lora_{name}": shape
    for layer in range(LAYERS)
    for name, shape in {"A": (4, 9), "B": (7, 4)}.items()
}
LARGE: dict[str, tuple[int, ...]] = {"A": (16, 4096), "head": (32_000, 1024)}


class HostCopies(TorchDispatchMode):
    """Inside, `count` is how often something was copied from a GPU to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if str(func).startswith(("aten.copy_", "aten._to_copy")):
            source = args[1] if str(func).startswith("aten.copy_") else args[0]
            self.count += source.device.type == "cuda" and made.device.type == "cpu"
        return made


def trained(shapes: dict[str, tuple[int, ...]], device: Any, **how: Any) -> tuple[Replica, Any]:
    """A replica, and the states of AdamW after a step."""
    torch.manual_seed(0)
    replica = Replica(Topology(0, 1, 1))
    replica.own({n: nn.Parameter(torch.randn(s, device=device)) for n, s in shapes.items()})
    optimizer = torch.optim.AdamW(list(replica.optimized.values()), **how)
    for part in replica.optimized.values():
        part.grad = torch.ones_like(part)
    optimizer.step()
    return replica, {"optimizer": states_of(optimizer, replica.optimized)}


@pytest.mark.parametrize("fused", [True, False])
def test_a_save_is_one_copy_for_each_dtype(fused: bool) -> None:
    """Of 128 tensors, 256 moments, as many counts of steps as tensors, and 128 frozen factors."""
    with fake_cuda() as cuda:
        replica, states = trained(MANY, cuda, fused=fused)
        frozen = {
            f"{name}0": torch.zeros(shape, dtype=torch.bfloat16, device=cuda)
            for name, shape in MANY.items()
        }
        with HostCopies() as copies:
            capture(replica, states, {}, frozen=frozen)
        assert copies.count == 2  # float32 and bfloat16


def test_a_large_save_is_one_copy_for_each_full_buffer() -> None:
    with fake_cuda() as cuda:
        replica, states = trained(LARGE, cuda, fused=True)
        with HostCopies() as copies:
            capture(replica, states, {})
    nbytes = 4 * sum(3 * a * b + 1 for a, b in LARGE.values())  # with a count of steps each
    assert copies.count == -(-nbytes // STAGING_BYTES) > 3


def test_what_is_captured_is_a_copy_of_each() -> None:
    """Of tensors of several dtypes, without dims, empty or laid out otherwise."""
    replica, states = trained(MANY | {"empty": (0, 3)}, "cpu", fused=False)
    more = {"0.lora_A": {"codes": torch.arange(36, dtype=torch.uint8).view(9, 4).t()}}
    frozen = {"A0": torch.randn(5, 3).t(), "B0": torch.randn(2, 2).bfloat16()}
    states |= {"scorer": more}
    captured = capture(replica, states, {"step": 3}, {"kept": 1}, frozen)
    assert captured is not None and captured.state == {"step": 3} and captured.record == {"kept": 1}
    check(captured.tensors, {**replica.named, **frozen})
    wanted = {
        file: {
            f"{name}.{slot}": state
            for name, slots in kept.items()
            for slot, state in slots.items()
            if name != "empty"
        }
        for file, kept in states.items()
    }
    assert captured.states.keys() == wanted.keys()
    for file, kept in wanted.items():
        check(captured.states[file], kept)


def check(found: dict[str, Tensor], wanted: dict[str, Any]) -> None:
    """The same bits, in memory of their own."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].is_contiguous()
        assert found[name].equal(tensor), name
        own = tensor.untyped_storage().data_ptr()
        assert not tensor.numel() or found[name].untyped_storage().data_ptr() != own
