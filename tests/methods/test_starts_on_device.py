"""What packs W0 and what starts adapters from it runs where W0 goes, and not on the host.

The devices are meta, and CUDA with fake tensors. Files are read on the host; all that follows the
copy from there is on the device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import HostWork, fake_cuda
from tiny import save_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dlora import LoraConfig, attach
from dlora.base.model import find_base
from dlora.base.packed_reader import StoredPackedWeights
from dlora.lora.init import INITS
from dlora.methods.packed_residual import Residuals
from dlora.quant.formats import FORMATS
from dlora.quant.linear import pack

K, N, R = 6, 128, 2
META = torch.device("meta")


class InFile:
    """Rows of a weight as `StoredWeights` reads them."""

    def is_plain(self, name: str) -> bool:
        return True

    def read(self, name: str, start: int, out: Tensor) -> None:
        assert out.device.type == "cpu"  # where files are mapped


def layer(device: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(N, K, device=device, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", FORMATS)
def test_w0_is_packed_on_the_device(name: str) -> None:
    """Its rows from the files, and a weight that is there already; the host only allocates."""
    with fake_cuda() as cuda:
        model = layer("meta")
        pack(model[0], name)
        reader: Any = StoredPackedWeights(InFile(), model)  # type: ignore[arg-type]
        there = layer(cuda)
        for part in ("weight_codes", "weight_scales"):
            out = torch.empty(model[0].get_parameter(part).shape, dtype=torch.uint8, device=cuda)
            reader.read(f"0.{part}", 0, out.view(-1))  # the tables of a format go there once
            with HostWork() as host:
                reader.read(f"0.{part}", 0, out.view(-1))
            assert host.calls == ["aten.empty.memory_format"]  # the rows as they are in the file
        with HostWork() as host:
            pack(there[0], name)
        assert host.calls == []
        assert there[0].weight_codes.device == cuda


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values; all conditions hold."""
    monkeypatch.setattr(FakeTensor, "__bool__", lambda self: True, raising=False)


@pytest.mark.parametrize("name", [name for name in INITS if INITS[name].needs != "nothing"])
def test_factors_are_made_on_the_device(name: Any, yes: None) -> None:
    config, init = LoraConfig(r=R, init_lora_weights=name), INITS[name]
    with fake_cuda() as cuda:
        matrix = torch.empty(K, N, dtype=torch.bfloat16, device=cuda)
        with HostWork() as host:
            A, B = init.factors(matrix, R, 2.0, **init.options_from(config))
        assert A.device == B.device == cuda
    assert host.calls == []


def test_dora_s_magnitudes_are_made_on_the_device() -> None:
    model = layer(META)
    attach(model, LoraConfig(r=R, use_dora=True))
    with HostWork() as host:
        model[0].adapter.see_weight(model[0].weight)
    assert host.calls == []


def test_a_packed_residual_is_made_on_the_device(tmp_path: Path) -> None:
    """Also because NCCL broadcasts no tensor of the host."""
    path = save_model(tmp_path / "model", "blocks", torch.float32)
    base = find_base(str(path), dtype="float32", quantization="nf4")
    residuals = Residuals(base, LoraConfig(r=R, init_lora_weights="pissa"), META)
    for first in residuals._layers.values():
        assert {t.device for t in first.adapter.state_dict().values()} == {META}
    assert residuals._matrix(first).device == META
    with HostWork() as host:
        left = residuals.left(first.path, 0, torch.empty(4, first.sizes[1], device=META))
    assert left.device == META
    assert host.calls == []
