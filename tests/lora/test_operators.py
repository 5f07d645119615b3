"""dlora's operators, which graphs of torch's compiler call, by torch's own checks of operators."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlora.lora.functional import summed  # noqa: F401 - registers dlora::summed, dlora::kept
from dlora.lora.hashing import mix
from dlora.objectives import packed_operator
from dlora.quant.formats import FORMATS

CHECKS = ("test_schema", "test_faketensor")


def attended(
    module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, **how: Any
) -> Tensor:
    scale, dropout = how.get("scaling"), how["dropout"]
    return F.scaled_dot_product_attention(*qkv, mask, dropout, scale=scale).transpose(1, 2)


def arguments(name: str) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    if name == "kept":
        return mix(torch.arange(5, dtype=torch.int32)), torch.tensor(7, dtype=torch.int32), 6, 0.3
    if name == "summed":
        left, right = (torch.randn(5, n, generator=generator).bfloat16() for n in (3, 4))
        return left, right, torch.float32, 2.0
    if name.startswith("unpack"):
        weight = torch.randn(3, 64, generator=generator)
        packed = FORMATS["nf4"].codes(weight), FORMATS["nf4"].scales(weight)
        return *packed, 64, "nf4", torch.bfloat16, *([weight] if name == "unpack_after" else [])
    packed_operator.add_function("of the test", attended)
    packed_operator.give_handle(MODULE)
    q = torch.randn(1, 4, 5, 8, generator=generator)
    k, v = (torch.randn(1, 4, 5, width, generator=generator) for width in (8, 6))
    how = (None, getattr(MODULE, packed_operator.HANDLE), "of the test", 0.5, 0.0, None, None)
    return q, k, v, *how


MODULE = nn.Identity()  # as long as its handle is used
NAMES = ["kept", "summed", "unpack", "unpack_after", "packed_attention"]
# Asks autograd, which is off inside of the modes that check; runs of packed rows in
# tests/training/test_compile.py call it.
UNCHECKED = {"packed_attention_backward"}


@pytest.mark.parametrize("name", NAMES)
def test_an_operator_is_what_it_declares(name: str) -> None:
    """It changes no input, returns no view, and has the shapes and types of its fake."""
    operator = getattr(torch.ops.dlora, name).default
    found = torch.library.opcheck(operator, arguments(name), test_utils=CHECKS)
    assert found == dict.fromkeys(CHECKS, "SUCCESS")


def test_all_of_them_are_checked() -> None:
    registered = torch._C._dispatch_get_all_op_names()
    found = {name.removeprefix("dlora::") for name in registered if name.startswith("dlora::")}
    assert found == UNCHECKED.union(NAMES)
