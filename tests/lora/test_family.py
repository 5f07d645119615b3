"""What every variant and every initialisation owes: found by themselves, checked alike.

A new file in `variants/` or `init/` is tested here without a change. Of a variant no more is known
than the seams of `LoraAdapter`; of an initialisation that needs a matrix, that it makes factors of
one, which each adapter starts from.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from causal_models import quiet_peft, randomize, relative_error
from exported import run_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from dlora import LoraConfig, UsageError, disabled, merge, save_adapter, unmerge
from dlora.adapters.settings import lora_config
from dlora.config.load import SCHEMA, AdapterConfig
from dlora.lora.attach import attach, named_adapters, trainable_parameters
from dlora.lora.init import INITS
from dlora.lora.variants import VARIANTS

pytestmark = quiet_peft
INPUT, WIDTH, R, STEPS = 10, 12, 4, 3
# Settings that a run knows by itself, and those of PEFT's files.
FILLED_IN = {"total_step", "task_type", "strict_names", "expert_settings"}


class Net(nn.Module):
    """One host of the kind in the middle of a net that has a gradient everywhere."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.host = HOSTS[kind]()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.host(x)
        y = y.flatten(2).mean(2) if y.ndim > 2 else y
        return self.head(torch.tanh(y))


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(INPUT, WIDTH),
    "Conv1D": lambda: Conv1D(WIDTH, INPUT),
    "Embedding": lambda: nn.Embedding(11, WIDTH),
    "Conv2d": lambda: nn.Conv2d(5, WIDTH, 3, stride=2, padding=1),
}


def net(host: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same at every call."""
    model = Net(host)
    randomize(model)
    return model.to(dtype)


def inputs(host: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if host == "Embedding":
        return torch.randint(11, (9,), generator=generator)
    shape = (4, 5, 6, 6) if host == "Conv2d" else (9, INPUT)
    return torch.randn(shape, generator=generator)


def config_of(case: str) -> LoraConfig:
    """The smallest configuration that means a variant or an initialisation."""
    what, _, name = case.partition(" ")
    if what == "init":
        value = next(key for key in INITS if str(key) == name)
        return LoraConfig(r=R, lora_alpha=6, target_modules=["host"], init_lora_weights=value)
    kind = VARIANTS[name].settings
    option = {} if kind.method == name else {f"use_{name}": True}
    config = kind(r=R, lora_alpha=6, target_modules=["host"], **option)
    assert config.variant == name
    return config


def attached(case: str, model: nn.Module, **changes: Any) -> nn.Module:
    """With adapters, at the start of training."""
    config = replace(config_of(case), **changes)
    torch.manual_seed(2)
    attach(model, config)
    init = INITS[config.init_lora_weights]
    settings = init.options_from(config)
    for _, host, adapter in named_adapters(model):
        if init.needs == "nothing":
            continue
        matrix = host.as_product(host.weight.detach()).float()
        if init.needs == "gradient":
            matrix = torch.randn(matrix.shape)
        factors = init.factors(matrix, adapter.r, adapter.scaling, **settings)
        if factors is not None:
            adapter.start_from(*factors)
    return model


def trained(case: str, host: str, **changes: Any) -> nn.Module:
    """After a few steps."""
    model = attached(case, net(host), **changes).train()
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        (model(inputs(host, step)) - 1).square().mean().backward()
        optimizer.step()
    return model.eval()


def attaches(case: str, host: str) -> bool:
    try:
        attach(net(host), config_of(case))
    except UsageError:
        return False
    return True


CASES = [*(f"variant {name}" for name in VARIANTS), *(f"init {name}" for name in INITS)]
PAIRS = [(case, host) for case in CASES for host in HOSTS if attaches(case, host)]
on_every_host = pytest.mark.parametrize(("case", "host"), PAIRS)
# A form that has another ΔW for each token is neither merged nor one plain LoRA.
MERGEABLE = {case: VARIANTS[config_of(case).variant].mergeable for case in CASES}
on_every_mergeable = pytest.mark.parametrize(
    ("case", "host"), [pair for pair in PAIRS if MERGEABLE[pair[0]]]
)


@pytest.mark.parametrize("case", CASES)
def test_it_is_set_in_the_configuration(case: str) -> None:
    """Each of its settings is an option of the section, and the section means it."""
    wanted = config_of(case)
    options = {field.name for field in fields(AdapterConfig)}
    assert {field.name for field in fields(wanted)} - FILLED_IN <= options
    assert wanted.init_lora_weights in get_args(SCHEMA["adapter.init_lora_weights"].type)
    chosen = {name: getattr(wanted, name) for name in ("use_dora", "init_lora_weights")}
    found = lora_config(run_config(Path("base"), Path("out"), method=wanted.method, **chosen))
    assert type(found) is type(wanted) and found.variant == wanted.variant
    assert found.init_lora_weights == wanted.init_lora_weights


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("host", HOSTS)
def test_a_host_is_adapted_or_refused_in_one_line(case: str, host: str) -> None:
    model = net(host)
    try:
        attach(model, config_of(case))
    except UsageError as refused:
        assert "host" in str(refused) and "\n" not in str(refused)
        assert not hasattr(model, "dlora")
    else:
        assert [path for path, _, _ in named_adapters(model)] == ["host"]
        assert all(".adapter." in name for name in trainable_parameters(model))
        assert {p.requires_grad for n, p in model.named_parameters() if "adapter" not in n} == {
            False
        }


@pytest.mark.parametrize("case", CASES)
def test_a_linear_layer_is_always_adapted(case: str) -> None:
    assert (case, "Linear") in PAIRS


@on_every_host
def test_it_starts_at_no_change(case: str, host: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        model, x = net(host, dtype), inputs(host)
        x = x if host == "Embedding" else x.to(dtype)
        before = model(x)
        after = attached(case, model)(x)
        assert after.dtype == dtype
        assert relative_error(after, before) <= tolerance, dtype


@on_every_mergeable
def test_stock_peft_computes_what_was_trained(case: str, host: str, tmp_path: Path) -> None:
    model, x = trained(case, host), inputs(host, 9)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(net(host), tmp_path).eval()
    with torch.no_grad():
        assert relative_error(theirs(x), model(x)) < 1e-5
        assert relative_error(net(host)(x), model(x)) > 1e-3  # it has been trained


@pytest.mark.parametrize("case", [case for case in CASES if not MERGEABLE[case]])
def test_what_cannot_be_merged_says_so_and_is_disabled(case: str) -> None:
    model, x = trained(case, "Linear"), inputs("Linear", 9)
    with torch.no_grad():
        y = model(x)
        with disabled(model):
            assert torch.equal(model(x), net("Linear")(x))
        with pytest.raises(UsageError, match="^merge: a .* for each token, so it cannot be merged"):
            merge(model)
        assert torch.equal(model(x), y)


@on_every_mergeable
def test_merged_disabled_and_unmerged(case: str, host: str) -> None:
    model, x = trained(case, host), inputs(host, 9)
    with torch.no_grad():
        y, base = model(x), net(host)(x)
        with disabled(model):
            assert torch.equal(model(x), base)
        merge(model)
        assert relative_error(model(x), y) < 1e-5
        unmerge(model)
        assert torch.equal(model.host.weight, net(host).host.weight)
        assert torch.equal(model(x), y)


@on_every_host
def test_its_tensors_by_name_are_all_of_its_state(case: str, host: str) -> None:
    """What a checkpoint holds: with its parameters and buffers a fresh adapter is the same."""
    model, x = trained(case, host), inputs(host, 9)
    state = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    torch.manual_seed(77)
    other = net(host).eval()
    attach(other, config_of(case))
    slots = tensors_of(other)
    assert slots.keys() == state.keys()
    with torch.no_grad():
        for name, slot in slots.items():
            assert slot.shape == state[name].shape and slot.dtype == state[name].dtype
            slot.copy_(state[name])
        assert torch.equal(other(x), model(x))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    adapter = model.host.adapter
    return {name: t.detach() for name, t in (*adapter.named_parameters(), *adapter.named_buffers())}


@on_every_host
def test_every_trained_tensor_has_a_gradient_after_two_steps(case: str, host: str) -> None:
    model = trained(case, host).train()
    (model(inputs(host, 5)) - 1).square().mean().backward()
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None and parameter.grad.any(), name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.dtype == parameter.dtype == torch.float32


@on_every_host
def test_a_recomputed_forward_with_dropout_gives_the_same_bits(case: str, host: str) -> None:
    model, found = trained(case, host, lora_dropout=0.3).train(), []
    for reentrant in (None, False, True):
        x = inputs(host, 5)
        x = x.requires_grad_() if x.is_floating_point() else x
        model.zero_grad()
        torch.manual_seed(6)
        y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
        if not y.requires_grad:
            continue  # ids alone: a reentrant checkpoint needs an input with a gradient
        y.square().mean().backward()
        parameters = [x, *trainable_parameters(model).values()]
        found.append([y.detach(), *(p.grad for p in parameters if p.grad is not None)])
    assert len(found) >= 2
    assert all(
        torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True)
    )


@on_every_host
def test_half_precision_keeps_the_masters_whole(case: str, host: str) -> None:
    """A bfloat16 base, and autocast: the output is near the float32 one, and so are gradients."""

    def run(dtype: torch.dtype, autocast: bool) -> list[Tensor]:
        model = trained(case, host)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        x = inputs(host, 5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x.to(dtype) if x.is_floating_point() else x)
        y.float().square().sum().backward()
        gradients = [p.grad for p in trainable_parameters(model).values()]
        assert {g.dtype for g in gradients} == {torch.float32}
        assert y.dtype == (torch.bfloat16 if autocast else dtype)
        return [y.float(), *gradients]

    wanted = run(torch.float32, False)
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        got = run(dtype, autocast)
        assert relative_error(got[0], wanted[0]) < 2e-2
        for gradient, expected in zip(got[1:], wanted[1:], strict=True):
            assert relative_error(gradient, expected) < 0.1


@on_every_host
def test_on_the_meta_device_it_makes_no_tensor(case: str, host: str) -> None:
    """How sizes are known before a weight is read; they are those of a real model."""
    with torch.device("meta"):
        model = Net(host)
    real = net(host)
    for each in (model, real):
        attach(each, config_of(case))
    tensors, wanted = tensors_of(model), tensors_of(real)
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in wanted.items()}
