"""Dropout's kernels in Triton, interpreted on the CPU: the bits of torch's operators."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calls import FREE, Calls
from fake_cuda import fake_cuda
from interpreted import Interpreter
from ptx import float_operations
from same_bits import assert_same_bits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import dlora.lora
from dlora import LoraConfig, attach
from dlora.lora import dropout_mask
from dlora.lora.attach import attachment_of
from dlora.lora.dropout import SampleKeys, key_of
from dlora.lora.dropout_mask import Mask, dropped
from dlora.lora.hashing import mix
from dlora.quant import where_triton

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {
    "whole": lambda T, n: torch.randn(T, n),
    "every second column": lambda T, n: torch.randn(T, 2 * n)[:, ::2],
    "columns together": lambda T, n: torch.randn(n, T).t(),
    "one row for all": lambda T, n: torch.randn(1, n).expand(T, n),
}
IMAGES = {
    "channels first": (lambda: torch.randn(3, 5, 4, 2), 1),
    "channels last": (lambda: torch.randn(3, 5, 4, 2).to(memory_format=torch.channels_last), 1),
    "a part": (lambda: torch.randn(3, 5, 4, 7)[..., 1:3], 1),
    "one alone": (lambda: torch.randn(5, 4, 2), 0),
    "tokens": (lambda: torch.randn(3, 8, 5), -1),
    "a vector": (lambda: torch.randn(5), -1),
}


@contextmanager
def by_torch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropout_mask, "in_triton", lambda *tensors: False)
        yield


@contextmanager
def by_triton() -> Iterator[None]:
    """Torch's way fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mask, "_hashes", None)
        yield


def mask_of(T: int, p: float, layer: Any = "q_proj") -> Mask:
    key = key_of(layer)
    if layer == "a tensor":
        return Mask(mix(torch.arange(T, dtype=torch.int32)), torch.tensor(key).int(), p)
    return Mask(mix(torch.arange(T, dtype=torch.int32)), key, p)


def spoiled(x: Tensor) -> Tensor:
    """With numbers that a product may treat otherwise."""
    for index, value in enumerate((-0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3e38)):
        x[(*(0,) * (x.ndim - 1), index % x.shape[-1])] = value
    return x


def dropped_alike(dtype: torch.dtype, T: int, n: int, p: float, layout: str, layer: str) -> None:
    x = LAYOUTS[layout](T, n).to(dtype)
    if T and n and layout != "one row for all":
        x = spoiled(x)
    mask = mask_of(T, p, layer)
    with by_triton():
        found, keep = mask.drop(x), mask.keep(n)
        again = mask.drop(x, keep)
    with by_torch():
        wanted, kept = mask.drop(x), mask.keep(n)
        assert_same_bits(mask.drop(x, kept), wanted)
    assert torch.equal(keep, kept)
    assert_same_bits(found, wanted)
    assert_same_bits(again, wanted)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("T", "n"), [(1, 1), (9, 70), (5, 513), (0, 8), (3, 0)])
def test_the_kernels_give_torch_s_bits(
    interpreter: Interpreter, dtype: torch.dtype, T: int, n: int
) -> None:
    interpreter(dropped_alike, dtype, T, n, 0.3, "whole", "q_proj")


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1 - 2**-30])
def test_any_share_may_be_dropped(interpreter: Interpreter, p: float) -> None:
    interpreter(dropped_alike, torch.bfloat16, 9, 70, p, "whole", "q_proj")


@pytest.mark.parametrize("layer", ["v_proj", "a tensor"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_x_may_lie_anyhow(interpreter: Interpreter, layout: str, layer: str) -> None:
    interpreter(dropped_alike, torch.bfloat16, 9, 70, 0.3, layout, layer)


def far_apart() -> None:
    """Elements more than 2³¹ behind the first; pages in between do not exist."""
    x = torch.empty(3 * 2**30 + 8, dtype=torch.bfloat16).as_strided((4, 8), (2**30, 1))
    x.copy_(torch.randn(4, 8))
    mask = mask_of(4, 0.3)
    with by_triton():
        found = mask.drop(x)
    assert_same_bits(found, mask.drop(x.contiguous()))


def test_offsets_have_64_bits(interpreter: Interpreter) -> None:
    interpreter(far_apart)


def differentiated_alike(dtype: torch.dtype, layout: str) -> None:
    make, dim = IMAGES[layout]
    x = make().to(dtype)
    dy = torch.randn_like(x)
    mask, results = mask_of(x.numel() // 5, 0.3), []
    for way in (by_triton, by_torch):
        given = x.detach().requires_grad_()
        with way():
            y = dropped(given, mask, dim)
            y.backward(dy)
        results.append((y.detach(), given.grad))
    for found, wanted in zip(*results, strict=True):
        assert_same_bits(found, wanted)
    y, dx = results[0]
    assert torch.equal(y == 0, (x == 0) | (dx == 0))  # one mask


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", IMAGES)
def test_a_gradient_has_the_mask_of_its_input(
    interpreter: Interpreter, dtype: torch.dtype, layout: str
) -> None:
    interpreter(differentiated_alike, dtype, layout)


def trained_alike(dora: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 12)).to(dtype)
    attach(model, LoraConfig(r=4, use_dora=dora, lora_dropout=0.3))
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.copy_(torch.randn_like(p))
    x, results = torch.randn(2, 7, 24, dtype=dtype), []
    keys = SampleKeys(seed=5, step=7, ids=(1, 2), lengths=(7, 4))
    for way in (by_triton, by_torch):
        model.zero_grad()
        with way(), attachment_of(model).stream.keyed(keys):
            y = model(x)
            y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in trained)])
    for found, wanted in zip(*results, strict=True):
        assert bool(wanted.any())
        assert_same_bits(found, wanted)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_have_torch_s_gradients(
    interpreter: Interpreter, dora: bool, dtype: torch.dtype
) -> None:
    interpreter(trained_alike, dora, dtype)


def compiled_alike() -> None:
    mask, x = mask_of(9, 0.3), torch.randn(9, 70)

    def computed(x: Tensor) -> Tensor:
        return mask.drop(x) + dropped(x, mask, 1)

    function = torch.compile(computed, backend="aot_eager", fullgraph=True)
    first = function(x)  # in which torch looks at operators
    with by_triton():
        found = function(x)
    with by_torch():
        wanted = computed(x)
    assert_same_bits(first, wanted)
    assert_same_bits(found, wanted)


def test_a_compiled_graph_stays_whole(interpreter: Interpreter) -> None:
    """It calls the operator of the mask, in which Triton computes from the second call on."""
    interpreter(compiled_alike)


def test_a_gpu_drops_in_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As float64 it does not."""
    asked: list[str] = []
    fake = SimpleNamespace(
        keep=lambda *args: asked.append("keep") or args[0],
        drop=lambda *args: asked.append("drop") or args[3],
    )
    monkeypatch.setattr(dlora.lora, "triton_dropout", fake, raising=False)
    monkeypatch.setattr(where_triton, "_PLAIN", (Tensor, FakeTensor))
    monkeypatch.setattr(where_triton, "is_in_torch_dispatch_mode", lambda: False)
    monkeypatch.setattr(where_triton, "_works", lambda device: device.type == "cuda")
    with fake_cuda() as cuda:
        mask = Mask(torch.empty(4, dtype=torch.int32, device=cuda), 7, 0.3)
        x = torch.empty(4, 6, device=cuda)
        with Calls() as calls:
            mask.drop(x)
            mask.keep(6)
            dropped(x, mask, 1)
        assert asked == ["drop", "keep", "drop"]
        assert {call.split(".")[1] for call in calls.counted} <= FREE
        mask.drop(x.double(), torch.empty(4, 6, dtype=torch.bool, device=cuda))
        assert asked == ["drop", "keep", "drop"]


def test_a_gpu_is_given_exact_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As compiled for one: products that are rounded once, and masks without floats."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from dlora.lora import triton_dropout

    numbers = dict.fromkeys(("T", "n", "columns", "layer", "threshold"), "i32")
    of_keep = {"out": "*i8", "tokens": "*i32", **numbers}
    tile = {"HEIGHT": 4, "WIDTH": 128}
    assert float_operations(triton_dropout._keep, of_keep, **tile) == set()
    strides = [f"{tensor}_{dim}" for tensor in ("x", "out") for dim in ("outer", "column", "place")]
    of_drop = of_keep | {"out": "*bf16", "x": "*bf16", "scale": "fp32", "places": "i32"}
    of_drop |= dict.fromkeys(strides, "i64")
    found = float_operations(triton_dropout._drop, of_drop, **tile)
    assert found == {"mul.f32", "cvt.rn.bf16.f32"}
