"""Kernels in Triton that unpack give torch's bits, interpreted on the CPU; and where they do it."""

from collections.abc import Iterator
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
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import dlora.quant
from dlora.quant import dequantize, int8, nf4, where_triton
from dlora.quant.formats import FORMATS, unpack
from dlora.quant.where_triton import in_triton

NAMES = ["nf4", "nf4-dq", "int8"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def rows(k: int, n: int) -> Tensor:
    """Rows from the smallest numbers to the largest, then one of zeros and one with a NaN."""
    generator = torch.Generator().manual_seed(k + n)
    w = torch.randn(k, n, generator=generator) * torch.logspace(-44, 37, max(k, 1))[:k, None]
    if k > 2:
        w[-2], w[-1, : n // 2] = 0, torch.nan
    return w


def without_bitsandbytes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nf4, "bitsandbytes_kernel", lambda: None)
    patch.setattr(dequantize, "bitsandbytes_kernel", lambda: None)


def unpacked_alike(name: str, dtype: torch.dtype, k: int, n: int, apart: bool = False) -> None:
    """Every code, with the scales of `rows`."""
    fmt = FORMATS[name]
    generator = torch.Generator().manual_seed(n)
    shape = (k, fmt.code_bytes(n))
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    scales = fmt.scales(rows(k, n))
    if apart:  # neither is contiguous, nor are the scales' bytes aligned
        codes, scales = codes.t().contiguous().t(), torch.cat([scales[:, :1], scales], 1)[:, 1:]
    with pytest.MonkeyPatch.context() as patch:
        without_bitsandbytes(patch)
        with pytest.MonkeyPatch.context() as only:  # torch's way fails
            only.setattr(nf4, "levels_times_scales", None)
            only.setattr(int8, "on_device", None)
            found = unpack(codes, scales, n, name, dtype)
        for module in (nf4, int8):
            patch.setattr(module, "in_triton", lambda *tensors: False)
        wanted = unpack(codes, scales, n, name, dtype)
    assert_same_bits(found, wanted)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("k", "n"), [(1, 64), (7, 192), (65, 64), (3, 4160), (0, 64)])
def test_the_kernels_give_torch_s_bits(
    interpreter: Interpreter, name: str, dtype: torch.dtype, k: int, n: int
) -> None:
    interpreter(unpacked_alike, name, dtype, k, n)


@pytest.mark.parametrize("n", [1, 70, 1025])
def test_rows_of_any_length_in_int8(interpreter: Interpreter, n: int) -> None:
    interpreter(unpacked_alike, "int8", torch.bfloat16, 4, n)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_unpacked_may_lie_apart(interpreter: Interpreter, name: str) -> None:
    interpreter(unpacked_alike, name, torch.bfloat16, 5, 128, True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A CUDA device on which Triton works: its tensors are fake, and pass for real ones."""
    monkeypatch.setattr(where_triton, "_PLAIN", (Tensor, FakeTensor))
    monkeypatch.setattr(where_triton, "is_in_torch_dispatch_mode", lambda: False)
    monkeypatch.setattr(where_triton, "_works", lambda device: device.type == "cuda")
    with fake_cuda() as cuda:
        yield cuda


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which kernels were asked for, in place of being run."""
    made: list[str] = []
    fake = SimpleNamespace(
        nf4=lambda *args: made.append("nf4-dq" if args[3] else "nf4"),
        int8=lambda *args: made.append("int8"),
    )
    monkeypatch.setattr(dlora.quant, "triton_unpack", fake, raising=False)
    return made


def packed(name: str, device: Any) -> tuple[Tensor, Tensor]:
    fmt = FORMATS[name]
    codes = torch.empty(2, fmt.code_bytes(64), dtype=torch.uint8, device=device)
    return codes, torch.empty(2, fmt.scale_bytes(64), dtype=torch.uint8, device=device)


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_unpacks_in_one_kernel(
    name: str, gpu: torch.device, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_bitsandbytes(monkeypatch)
    codes, scales = packed(name, gpu)
    FORMATS[name].unpack(codes, scales, torch.bfloat16)  # the levels go there once
    with Calls() as calls:
        FORMATS[name].unpack(codes, scales, torch.bfloat16)
    assert asked == [name, name]
    assert {call.split(".")[1] for call in calls.counted} <= FREE


def test_bitsandbytes_goes_before(
    gpu: torch.device, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_it: list[Any] = []
    for module in (nf4, dequantize):
        monkeypatch.setattr(module, "bitsandbytes_kernel", lambda: lambda *args: by_it.append(args))
    FORMATS["nf4"].unpack(*packed("nf4", gpu), torch.bfloat16)
    assert len(by_it) == 1 and asked == []


def test_not_where_there_is_no_data(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.empty(2, device=gpu)
    assert in_triton(tensor)
    assert not in_triton(torch.empty(2, device="meta"))
    monkeypatch.setattr(where_triton, "_PLAIN", (Tensor,))
    assert not in_triton(tensor)


def test_not_where_somebody_looks(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.empty(2, device=gpu)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not in_triton(tensor)
    monkeypatch.undo()  # of the fixture too: the mode of fake tensors is seen
    monkeypatch.setattr(where_triton, "_PLAIN", (FakeTensor,))
    monkeypatch.setattr(where_triton, "_works", lambda device: True)
    assert not in_triton(tensor)


def test_not_on_a_cpu() -> None:
    assert not in_triton(torch.empty(2))


class Broken:
    """In place of the kernels, on a machine without a C compiler."""

    @staticmethod
    def int8(*args: Any) -> None:
        raise RuntimeError("Failed to find C compiler")


@pytest.mark.parametrize(
    ("installed", "capability", "hip", "interprets", "wanted"),
    [
        (True, (9, 0), None, "0", True),
        (True, (8, 0), None, "", True),
        (True, (7, 5), None, "", False),
        (True, (9, 0), "6.3", "", False),
        (True, (9, 0), None, "1", False),
        (False, (9, 0), None, "", False),
    ],
)
def test_a_gpu_has_to_be_one_of_triton_s(
    installed: bool,
    capability: tuple[int, int],
    hip: str | None,
    interprets: str,
    wanted: bool,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = object() if installed else None
    monkeypatch.setattr(where_triton.importlib.util, "find_spec", lambda name, package=None: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setenv("TRITON_INTERPRET", interprets)
    with fake_cuda() as cuda:
        assert where_triton._works.__wrapped__(cuda) is wanted
    assert asked == (["int8"] if wanted else [])


def test_a_gpu_computes_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        where_triton.importlib.util, "find_spec", lambda name, package=None: object()
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dlora.quant, "triton_unpack", Broken, raising=False)
    with fake_cuda() as cuda, pytest.warns(UserWarning, match="cuda:0.*Failed to find C compiler"):
        assert not where_triton._works.__wrapped__(cuda)


POINTERS = {"out": "*bf16", "codes": "*u8", "scales": "*u8"}
SIZES = {"parts": "i32"}


def test_a_gpu_is_given_exact_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As compiled for one: a division that is rounded to the nearest, and nothing fused."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from dlora.quant import triton_unpack

    of_nf4 = {**POINTERS, "levels": "*fp32", "half": "i32", **SIZES}
    found = float_operations(triton_unpack._nf4, of_nf4, DOUBLE=True, BLOCK=256)
    assert found == {"div.rn.f32", "mul.f32", "cvt.rn.bf16.f32"}
    of_int8 = {**POINTERS, "codes": "*i8", "scales": "*fp32", "n": "i32", **SIZES}
    found = float_operations(triton_unpack._int8, of_int8, BLOCK=256)
    assert found == {"div.rn.f32", "mul.f32", "cvt.rn.bf16.f32"}
