"""DoRA: the golden example, plain float64 autograd, what it keeps and what it never makes."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from causal_models import causal_model, logits, randomize_trainable, relative_error
from golden import X, assert_is, layer
from golden import Y as WITHOUT_MAGNITUDE
from made_tensors import Made
from refusals import refusal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from dlora import LoraConfig, attach, disabled, load_adapter, merge, save_adapter, shard, unmerge
from dlora.lora import functional_dora
from dlora.lora.attach import attachment_of, named_adapters, trainable_parameters
from dlora.lora.dropout import SampleKeys
from dlora.lora.states import AdapterState
from dlora.optim.groups import parameter_groups
from dlora.optim.lora_pro import LoraPro
from dlora.quant.linear import pack, unpacked

# methods.md, section 18
MAGNITUDE = [2.5, 1.732050808, 1.224744871, 1.870828693]
NORMS = [3.618673790, 3.074280404, 1.229959349, 2.361524931]
Y = [0.925753520, 0.969048687, 0.537710642, 0.839744857]
KEYS = SampleKeys(seed=0, step=3, ids=(11, 12), lengths=(4, 3))
R = 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("stored", ["linear", "conv1d"])
def test_dora_is_the_golden_example(stored: str, dtype: torch.dtype) -> None:
    model = layer(stored, dtype, use_dora=True)
    adapter, tolerance = model[0].adapter, 1e-9 if dtype == torch.float64 else 1e-6
    assert_is(adapter.lora_magnitude_vector, MAGNITUDE, 1e-6)
    y = model(torch.tensor(X, dtype=dtype))
    assert_is(y, Y, tolerance)
    (y.square().sum() / 2).backward()
    # L = ½‖y‖², so G = y xᵀ; the norm is a constant (a derivative of it gives −1.2174, 2.0240)
    assert_is(adapter.lora_B.grad[0], [-0.5117, 1.5350], 5e-5)
    wanted = [y * v / n for y, v, n in zip(Y, WITHOUT_MAGNITUDE, NORMS, strict=True)]  # V x
    assert_is(adapter.lora_magnitude_vector.grad, wanted, tolerance)


HOSTS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(5, 7), torch.randn(2, 4, 5)),
    "linear without bias": lambda: (nn.Linear(5, 7, bias=False), torch.randn(2, 4, 5)),
    "conv1d of gpt2": lambda: (Conv1D(7, 5), torch.randn(2, 4, 5)),
    "embedding": lambda: (nn.Embedding(9, 7), torch.randint(9, (2, 4))),
    "convolution": lambda: (nn.Conv2d(3, 7, 3, stride=2, padding=1), torch.randn(2, 3, 6, 5)),
    "convolution, single": lambda: (nn.Conv1d(3, 7, 2, bias=False), torch.randn(3, 6)),
}


def attached(module: nn.Module, *, move: bool = True, **settings: Any) -> nn.Sequential:
    model = nn.Sequential(module)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    attach(
        model, LoraConfig(r=R, lora_alpha=2 * R, target_modules=["0"], use_dora=True, **settings)
    )
    if move:
        randomize_trainable(model)
    return model


def plain(host: Any, x: Tensor, dropped: Tensor, trained: dict[str, Tensor]) -> Tensor:
    """base(x) + (μ/n − 1)⊙(W0 drop(x)) + (μ/n)⊙s·B A drop(x), each product by torch's own layer."""
    base = copy.deepcopy(host)
    base.adapter.become(AdapterState.OFF)
    weight = host.weight.detach()
    delta = 2 * trained["lora_B"] @ trained["lora_A"]
    n = (host.as_product(weight) + delta.detach()).norm(dim=1)
    d = trained["lora_magnitude_vector"] / n

    def product(w: Tensor) -> Tensor:
        values = {"weight": w}
        if getattr(host, "bias", None) is not None:
            values["bias"] = torch.zeros_like(host.bias)
        return torch.func.functional_call(base, values, (dropped,))

    if isinstance(host, (nn.Conv1d, nn.Conv2d)):
        d = d.view(-1, *(1 for _ in host.kernel_size))
    return base(x) + (d - 1) * product(weight) + d * product(host.as_stored(host, delta))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", HOSTS)
def test_a_layer_equals_the_formula_under_plain_autograd(kind: str, dropout: float) -> None:
    torch.manual_seed(0)
    module, x = HOSTS[kind]()
    model = attached(module.double(), lora_dropout=dropout)
    host, adapter = model[0], model[0].adapter
    trained = dict(adapter.named_parameters())
    if is_float := x.is_floating_point():
        x = x.double().requires_grad_()
    with attachment_of(model).stream.keyed(KEYS):
        y = model(x)
        columns = 1 - host.weight.ndim if isinstance(host, (nn.Conv1d, nn.Conv2d)) else -1
        mask = adapter.mask(x, columns) if is_float else None
        dy = torch.randn_like(y)
        inputs = [*trained.values(), *([x] if is_float else [])]
        gradients = torch.autograd.grad(y, inputs, dy)
    dropped = x
    if mask is not None:
        shape = x.movedim(columns, -1).shape
        dropped = x * mask.keep(shape[-1]).view(shape).movedim(-1, columns) / (1 - dropout)
    wanted = plain(host, x, dropped, trained)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(wanted, inputs, dy)
    for got, correct in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, correct, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", HOSTS)
def test_a_fresh_adapter_changes_nothing_and_merged_rows_have_the_magnitudes(kind: str) -> None:
    torch.manual_seed(0)
    module, x = HOSTS[kind]()
    model = attached(module, move=False)
    with disabled(model):
        base = model(x)
    torch.testing.assert_close(model(x), base, rtol=1e-6, atol=1e-6)
    randomize_trainable(model)
    y, before = model(x), module.weight.detach().clone()
    assert relative_error(y, base) > 0.05
    merge(model)
    lengths = module.as_product(module.weight.detach()).norm(dim=1)
    torch.testing.assert_close(lengths, module.adapter.lora_magnitude_vector.abs().detach())
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert torch.equal(module.weight, before) and torch.equal(model(x), y)


@pytest.mark.parametrize("init", ["orthogonal", "gaussian"])
def test_other_starts_change_nothing_either(init: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32)).double()
    x = torch.randn(5, 64).double()
    before = model(x)
    attach(model, LoraConfig(r=4, use_dora=True, init_lora_weights=init))
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_an_offset_is_part_of_the_direction() -> None:
    """With B0 A0 subtracted, training starts at W0 for the norm as well."""
    torch.manual_seed(0)
    model = attached(nn.Linear(5, 7).double(), move=False)
    adapter, x = model[0].adapter, torch.randn(3, 5).double()
    before = model(x)
    adapter.offset_A, adapter.offset_B = torch.zeros(R, 5).double(), torch.zeros(7, R).double()
    adapter.start_from(torch.randn(R, 5), torch.randn(7, R))
    assert torch.equal(model(x), before)
    randomize_trainable(model)
    wanted = model[0].weight + adapter.delta()
    wanted = wanted * (adapter.lora_magnitude_vector / wanted.norm(dim=1))[:, None]
    torch.testing.assert_close(model(x), x @ wanted.t() + model[0].bias, rtol=1e-12, atol=1e-12)


def test_rows_of_zeros_stay_zero_and_give_no_nan() -> None:
    torch.manual_seed(0)
    model = attached(nn.Linear(5, 4, bias=False), move=False)
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].adapter.see_weight(model[0].weight)
        model[0].adapter.lora_B.normal_()[1] = 0
    y = model(torch.randn(3, 5))
    y.sum().backward()
    assert not y[:, 1].any()
    assert all(p.grad.isfinite().all() for p in trainable_parameters(model).values())
    merged = merge(model)[0].weight
    assert merged.isfinite().all() and not merged[1].any()


@pytest.mark.parametrize("bias", [True, False])
def test_a_bfloat16_base_keeps_small_changes_of_a_magnitude(bias: bool) -> None:
    """In bfloat16 a scale of 1.0105 would be 1.0078; what is left is the output's own rounding."""
    torch.manual_seed(0)
    model = attached(nn.Linear(64, 48, bias=bias).bfloat16(), move=False)
    x = torch.randn(200, 64).bfloat16()
    with torch.no_grad():
        before = model(x).double()
        model[0].adapter.lora_magnitude_vector.mul_(1.0105)
        change = model(x).double() - before
    inner = before - (model[0].bias.double() if bias else 0)
    found = float((change * inner).sum() / inner.square().sum())
    assert found == pytest.approx(0.0105, rel=0.05)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "int8"])
def test_a_packed_base_is_the_base_of_what_it_stands_for(name: str, kind: str) -> None:
    torch.manual_seed(0)
    packed: Any = Conv1D(128, 64) if kind == "conv1d" else nn.Linear(64, 128)
    nn.init.normal_(packed.weight)
    whole = copy.deepcopy(packed)
    pack(packed, name, transposed=kind == "conv1d")
    whole.weight.data = unpacked(packed)
    results = []
    for module in (packed, whole):
        model = nn.Sequential(module)
        torch.manual_seed(1)
        attach(model, LoraConfig(r=R, target_modules=["0"], use_dora=True))
        randomize_trainable(model)
        x = torch.linspace(-1, 1, 320).view(5, 64).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        gradients = [p.grad for p in trainable_parameters(model).values()]
        results.append([y, x.grad, *gradients, merge(model)(x)])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("case", ["float32", "bfloat16", "dropout", "nf4", "autocast"])
def test_nothing_of_the_size_of_w0_is_made(case: str) -> None:
    torch.manual_seed(0)
    m, n, tokens = 1024, 1024, 8
    module: Any = nn.Linear(n, m)
    if case == "nf4":
        pack(module, case)
    model = nn.Sequential(module.bfloat16() if case == "bfloat16" else module)
    attach(model, LoraConfig(r=4, use_dora=True, lora_dropout=0.5 if case == "dropout" else 0.0))
    x = torch.randn(tokens, n, requires_grad=True, dtype=model[0].bias.dtype)
    with Made() as made, torch.autocast("cpu", enabled=case == "autocast"):
        model(x).float().sum().backward()
    whole = sum(size >= m * n for size in made.numels)
    # De-quantised once in each pass; autocast casts W0, as it does for a plain layer.
    assert whole == {"nf4": 2, "autocast": 1}.get(case, 0)
    assert sum("unpack" in name for name in made.operators) == (2 if case == "nf4" else 0)


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.Conv1d(3, 4, 3, padding=1),
    "2d": lambda: nn.Conv2d(3, 4, (3, 2), stride=2),
    "3d": lambda: nn.Conv3d(3, 4, 2, bias=False),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_are_peft_s(kind: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(CONVOLUTIONS[kind]())
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": ["0"], "use_dora": True}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    randomize_trainable(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    x = torch.randn(2, 3, *([6] * int(kind[0])))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    torch.testing.assert_close(again(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_magnitudes_have_their_rate_and_no_decay() -> None:
    model = attached(nn.Linear(5, 7))
    named = trainable_parameters(model)
    groups = parameter_groups(named, lr=1e-3, loraplus_lr_ratio=8, weight_decay=0.1)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    adapter = model[0].adapter
    assert len(found) == len(named) == 3
    assert found[id(adapter.lora_magnitude_vector)] == (1e-3, 0.0)
    assert found[id(adapter.lora_A)] == (1e-3, 0.1)
    assert found[id(adapter.lora_B)] == (8e-3, 0.1)


def test_lora_pro_steps_pairs_and_adamw_the_magnitudes() -> None:
    """A and B of V = W0 + s·B·A are a pair as in a LoRA: what reaches them is the gradient of V."""
    torch.manual_seed(0)
    model = attached(nn.Linear(5, 7))
    reference, adapter = copy.deepcopy(model), model[0].adapter
    replica = shard(model)
    optimizer = LoraPro(replica.parameter_groups(lr=1e-2), replica.pairs)
    assert [(pair.A, pair.B) for pair in replica.pairs] == [(adapter.lora_A, adapter.lora_B)]
    theirs = torch.optim.AdamW(trainable_parameters(reference).values(), lr=1e-2, weight_decay=0)
    for _ in range(2):
        for one, step in ((model, optimizer), (reference, theirs)):
            with torch.no_grad():  # the same gradient for both, wherever A and B are by now
                for parameter in trainable_parameters(one).values():
                    parameter.grad = torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
            step.step()
    expected = reference[0].adapter
    torch.testing.assert_close(adapter.lora_magnitude_vector, expected.lora_magnitude_vector)
    assert not torch.allclose(adapter.lora_A, expected.lora_A)


def test_a_whole_model_merges() -> None:
    model = causal_model("gpt2").eval()
    targets = ["c_attn", "c_proj", "wte", "lm_head"]
    attach(model, LoraConfig(r=R, target_modules=targets, use_dora=True, use_rslora=True))
    randomize_trainable(model)
    wanted = logits(model)
    assert relative_error(logits(merge(model)), wanted) < 1e-5
    assert not any(adapter.active for _, _, adapter in named_adapters(model))


def test_a_base_that_something_else_sharded_is_refused_before_it_is_touched() -> None:
    model = nn.Sequential(nn.Linear(5, 7))
    model[0].weight.ds_id = 0  # as DeepSpeed marks what it has partitioned
    said = refusal(attach, model, LoraConfig(r=2, use_dora=True))
    assert "dora starts from W0: weight is sharded; call dlora.sha" in said
    assert type(model[0]) is nn.Linear and not hasattr(model, "dlora")


def test_norms_are_made_once_for_all_passes_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside `shared`, whatever the micro-batches and recomputations, with the same gradients."""
    torch.manual_seed(0)
    made, make = [], functional_dora.row_norms
    monkeypatch.setattr(
        functional_dora, "row_norms", lambda *args: made.append(args) or make(*args)
    )
    model = nn.Sequential(nn.Linear(8, 6), nn.Conv1d(4, 5, 3), nn.Linear(4, 3))
    attach(model, LoraConfig(r=2, use_dora=True, target_modules=["0", "1", "2"]))
    trained = list(trainable_parameters(model).values())
    for parameter in trained:
        nn.init.normal_(parameter)
    xs = torch.randn(3, 2, 4, 8)

    def step() -> list[Tensor]:
        for x in xs:
            checkpoint(model, x, use_reentrant=False).square().sum().backward()
        gradients = [p.grad.clone() for p in trained]
        model.zero_grad()
        return gradients

    apart, made[:] = step(), []
    with attachment_of(model).values.shared():
        together = step()
    assert len(made) == 3
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
    with torch.no_grad():
        trained[0].mul_(2)
    with attachment_of(model).values.shared():
        assert not torch.equal(step()[0], together[0])
    assert len(made) == 6
