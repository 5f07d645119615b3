"""Kernels in Triton as a GPU runs them: the bits of torch's operators on a CPU and on the GPU."""

from collections.abc import Iterator

import pytest
import torch
from same_bits import assert_same_bits
from torch import Tensor

from dlora.lora import dropout_mask
from dlora.lora.dropout_mask import Mask, dropped
from dlora.lora.hashing import mix
from dlora.quant import dequantize, int8, nf4
from dlora.quant.formats import FORMATS
from dlora.quant.where_triton import in_triton

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason=f"no GPU; torch is {torch.__version__}"
)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["triton", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Who computes on the GPU."""
    for module in (nf4, dequantize):
        monkeypatch.setattr(module, "bitsandbytes_kernel", lambda: None)
    if request.param == "torch":
        for module in (nf4, int8, dropout_mask):
            monkeypatch.setattr(module, "in_triton", lambda *tensors: False)
    else:
        assert in_triton(torch.ones(1, device="cuda"))
    yield request.param


def packed(name: str, k: int, n: int) -> tuple[Tensor, Tensor]:
    """Rows from the smallest numbers to the largest."""
    w = torch.randn(k, n) * torch.logspace(-44, 37, k)[:, None]
    return FORMATS[name].codes(w), FORMATS[name].scales(w)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "int8"])
def test_weights_are_those_of_a_cpu(way: str, name: str, dtype: torch.dtype) -> None:
    for k, n in ((1, 64), (515, 1024), (70, 4160)):
        codes, scales = packed(name, k, n)
        found = FORMATS[name].unpack(codes.cuda(), scales.cuda(), dtype).cpu()
        assert_same_bits(found, FORMATS[name].unpack(codes, scales, dtype))


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_weights_are_packed_as_on_a_cpu(name: str) -> None:
    w = torch.randn(515, 1024)
    for made in (FORMATS[name].codes, FORMATS[name].scales):
        assert torch.equal(made(w.cuda()).cpu(), made(w))


def test_a_weight_of_more_than_2_31_elements() -> None:
    k, n = 65537, 32768
    codes, scales = packed("int8", 1, n)
    found = FORMATS["int8"].unpack(
        codes.cuda().expand(k, n).contiguous(),
        scales.cuda().expand(k, 4).contiguous(),
        torch.bfloat16,
    )
    wanted = FORMATS["int8"].unpack(codes, scales, torch.bfloat16)
    assert_same_bits(found[-1:].cpu(), wanted)
    mask = Mask(mix(torch.arange(k, dtype=torch.int32)), 12345, 0.3)
    there = Mask(mask.tokens.cuda(), 12345, 0.3)
    last = Mask(mask.tokens[-1:], 12345, 0.3)
    assert_same_bits(there.drop(found)[-1:].cpu(), last.drop(wanted))
    assert torch.equal(there.keep(n)[-1:].cpu(), last.keep(n))


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_dropped_is_what_a_cpu_drops(way: str, dtype: torch.dtype) -> None:
    tokens = mix(torch.arange(1000, dtype=torch.int32))
    for p in (0.05, 0.5):
        x = torch.randn(1000, 777).to(dtype)
        mask, there = Mask(tokens, 12345, p), Mask(tokens.cuda(), 12345, p)
        assert_same_bits(there.drop(x.cuda()).cpu(), mask.drop(x))
        assert_same_bits(there.drop(x.cuda()[:, ::2]).cpu(), mask.drop(x[:, ::2]))
        assert torch.equal(there.keep(777).cpu(), mask.keep(777))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_has_the_mask_of_its_input(way: str, layout: torch.memory_format) -> None:
    tokens = mix(torch.arange(4 * 9 * 8, dtype=torch.int32))
    x, dy = (torch.randn(4, 33, 9, 8).to(memory_format=layout) for _ in range(2))
    results = []
    for device in ("cuda", "cpu"):
        given = x.detach().to(device).requires_grad_()
        y = dropped(given, Mask(tokens.to(device), 12345, 0.3), 1)
        y.backward(dy.to(device))
        results.append((y.detach().cpu(), given.grad.cpu()))
    for found, wanted in zip(*results, strict=True):
        assert_same_bits(found, wanted)
