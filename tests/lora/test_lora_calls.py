"""What one adapted layer asks of torch: how many operators, beside PEFT's, and graphs without a
break."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from calls import FREE, Calls
from fake_cuda import fake_cuda
from torch import Tensor, nn

from dlora import AdaLoraConfig, LoraConfig, attach
from dlora.lora.attach import attachment_of, trainable_parameters
from dlora.lora.dropout import SampleKeys
from dlora.lora.functional import LinearWithLowRank
from dlora.lora.step_values import StepValues
from dlora.quant.linear import pack

ROWS, TOKENS, N, M = 2, 5, 8, 6
WIDE = 64  # a block of nf4


class Peft(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(N, M, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def kernels(step: Callable[[], Any]) -> int:
    """Operators that compute, in the second of two steps: gradients are added to by then."""
    step()
    with Calls() as calls:
        step()
    named = ((name.split(".")[1], count) for name, count in calls.counted.items())
    return sum(count for name, count in named if name not in FREE)


def passes(model: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    x = torch.randn(ROWS, TOKENS, N, dtype=dtype, requires_grad=True)
    dy = torch.ones(ROWS, TOKENS, M, dtype=dtype)

    def step() -> None:
        torch.autograd.backward(model(x), dy, inputs=[x, *trained])

    trained = [p for p in model.parameters() if p.requires_grad]
    return step


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def twins(dtype: torch.dtype, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """A layer with dlora's adapter, and with PEFT's."""
    ours = nn.Sequential(nn.Linear(N, M, bias=False, dtype=dtype))
    attach(ours, LoraConfig(r=2, **settings))
    config = peft.LoraConfig(r=2, target_modules=["layer"], **settings)
    return ours, peft.get_peft_model(Peft(dtype), config, autocast_adapter_dtype=True)


@DTYPES
def test_operators_of_a_layer(dtype: torch.dtype) -> None:
    """3 products in forward, 5 in backward, and 3 sums with the gradients that there are, of x too.

    In bfloat16 A and B are cast once in all passes of a step, and on a CPU the factors of the sums
    in float32 as well.
    """
    ours, theirs = twins(dtype)
    with attachment_of(ours).values.shared():
        found = kernels(passes(ours, dtype))
    assert found <= {torch.float32: 11, torch.bfloat16: 15}[dtype]
    assert found < kernels(passes(theirs, dtype))


@DTYPES
def test_operators_of_a_layer_with_dora(dtype: torch.dtype) -> None:
    """The norms once in all passes of a step, and nothing of the size of W0 but its products."""
    ours, theirs = twins(dtype, use_dora=True)
    with attachment_of(ours).values.shared():
        found = kernels(passes(ours, dtype))
    assert found <= {torch.float32: 22, torch.bfloat16: 27}[dtype]
    assert found < kernels(passes(theirs, dtype))


class Large(Calls):
    """Counts operators that make as many elements as the input of the layer has."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        computes = isinstance(made, Tensor) and str(func).split(".")[1] not in FREE
        if computes and made.numel() == ROWS * TOKENS * N:
            self.counted["large"] += 1
        return made


@DTYPES
def test_operators_of_a_layer_with_dropout(dtype: torch.dtype) -> None:
    """A mask is hashed in 6 operators of the input's size, in forward and again in backward, where
    PEFT draws it in one and stores it. The hashes of tokens and columns are of no size.
    """
    ours, theirs = twins(dtype, lora_dropout=0.1)
    keys, counts = SampleKeys(0, 1, (4, 5), (TOKENS, TOKENS)), []
    with attachment_of(ours).values.shared(), attachment_of(ours).stream.keyed(keys):
        for model in (ours, theirs):
            step = passes(model, dtype)
            step()
            with Large() as calls:
                step()
            counts.append(calls["large"])
        assert kernels(passes(ours, dtype)) <= {torch.float32: 67, torch.bfloat16: 71}[dtype]
    assert counts[0] <= counts[1] + 2 * 6 + 1


class Context:
    """Stands for autograd's, which needs a GPU where a tensor says that it lies on one."""

    needs_input_grad = (True, False, False, True, True, *[False] * 4)
    saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


@torch.no_grad()
def test_operators_of_a_layer_on_a_gpu() -> None:
    """Beside the two sums with the gradients that there are: 10 in all."""
    kinds = {"dtype": torch.bfloat16}
    values = StepValues()
    with fake_cuda() as device, values.shared():
        x, dy = (torch.empty(ROWS * TOKENS, n, device=device, **kinds) for n in (N, M))
        W0 = torch.empty(M, N, device=device, **kinds)
        A, B = torch.empty(2, N, device=device), torch.empty(M, 2, device=device)

        def step() -> None:
            context = Context()
            arguments = (x, W0, None, A, B, None, 2.0, None, values.get)
            LinearWithLowRank.forward(context, *arguments)
            LinearWithLowRank.backward(context, dy)

        assert kernels(step) == 8


def packed(layer: nn.Linear) -> nn.Linear:
    pack(layer, "nf4")
    return layer


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], tuple[int, ...]]] = {
    "lora": (lambda: nn.Linear(N, M), lambda: LoraConfig(r=2, lora_dropout=0.3), (2, 5, N)),
    "dora": (
        lambda: nn.Linear(N, M),
        lambda: LoraConfig(r=2, use_dora=True, lora_dropout=0.3),
        (2, 5, N),
    ),
    "adalora": (
        lambda: nn.Linear(N, M),
        lambda: AdaLoraConfig(
            init_r=3, target_r=2, total_step=10, lora_dropout=0.3, target_modules=["0"]
        ),
        (2, 5, N),
    ),
    "packed": (
        lambda: packed(nn.Linear(WIDE, M)),
        lambda: LoraConfig(r=2, lora_dropout=0.3, target_modules=["0"]),
        (2, 5, WIDE),
    ),
    "embedding": (lambda: nn.Embedding(9, M), lambda: LoraConfig(r=2, target_modules=["0"]), ()),
    "convolution": (
        lambda: nn.Conv1d(4, M, 3),
        lambda: LoraConfig(r=2, target_modules=["0"], lora_dropout=0.3),
        (2, 4, 5),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_one_graph(case: str) -> None:
    """`fullgraph=True`; other keys of dropout give other masks, as they do without compiling."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    module, config, shape = CASES[case]
    model = nn.Sequential(module())
    attach(model, config())
    trained = list(trainable_parameters(model).values())
    for parameter in trained:
        nn.init.normal_(parameter)
    x = torch.randn(shape, requires_grad=True) if shape else torch.randint(9, (2, 5))
    inputs = [*trained, *([x] if shape else [])]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    seen = []
    for step in (1, 2):
        with attachment_of(model).stream.keyed(SampleKeys(0, step, (4, 5), (5, 4))):
            eager, graph = (
                torch.autograd.grad(run(x).square().sum(), inputs) for run in (model, compiled)
            )
        for got, wanted in zip(graph, eager, strict=True):
            torch.testing.assert_close(got, wanted)
        seen.append(graph[0])
    assert torch.equal(*seen) is (case == "embedding")  # which has no dropout


def one_graph(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """The compiled function has the gradients of the function."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    wanted, got = (
        torch.autograd.grad(run(*inputs).square().sum(), inputs) for run in (function, compiled)
    )
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_packed_layer_without_adapter_is_one_graph() -> None:
    one_graph(packed(nn.Linear(WIDE, M)), torch.randn(ROWS, TOKENS, WIDE, requires_grad=True))
