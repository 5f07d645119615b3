"""FLoRA: its definition written out with einsum, its start, and its exact form as a LoRA."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from causal_models import causal_model, logits, quiet_peft, randomize_trainable, relative_error
from golden import HALF_SQUARE, MERGED, W0, A, B, X, Y, assert_is
from refusals import refusal
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from unet import CONVOLUTIONS, TARGETS, noisy, unet

from dlora import FloraConfig, LoraConfig, UsageError, attach, load_adapter, save_adapter, shard
from dlora.lora.attach import named_adapters, trainable_parameters
from dlora.optim.groups import parameter_groups

pytestmark = quiet_peft
M, N = 6, 4  # out and in


def convolution(dims: int, kernel: tuple[int, ...]) -> nn.Module:
    return CONVOLUTIONS[dims](N, M, kernel, stride=2, padding=1)


# The host, the shape of x, and the definition of ΔW/s in the host's own orientation.
LAYERS: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "linear": (lambda: nn.Linear(N, M), (5, N), "ab,ai,ob->oi"),
    "conv1d": (lambda: Conv1D(M, N), (5, N), "ab,ai,ob->io"),
    "embedding": (lambda: nn.Embedding(9, M), (7,), "ab,ai,ob->io"),
    "1d": (lambda: convolution(1, (3,)), (2, N, 7), "abp,ai,ob,xp->oix"),
    "2d": (lambda: convolution(2, (3, 2)), (2, N, 5, 6), "abpq,ai,ob,xp,yq->oixy"),
    "3d": (lambda: convolution(3, (2, 3, 1)), (2, N, 4, 5, 3), "abpqr,ai,ob,xp,yq,zr->oixyz"),
}
RANKS = {"3, 2": (3, 2, None), "2, 3": (2, 3, 2), "alike": (2, None, 1)}


def layer(name: str, ranks: str, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """An adapted layer with a random core and random factors."""
    r, r_out, kernel_r = RANKS[ranks]
    torch.manual_seed(3)
    model = nn.Sequential(LAYERS[name][0]()).to(dtype)
    settings = {"flora_r_out": r_out, "flora_kernel_r": kernel_r if name[0] in "123" else None}
    attach(model, FloraConfig(r=r, lora_alpha=6, target_modules=["0"], **settings))
    randomize_trainable(model)
    return model


def inputs(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(4)
    shape = LAYERS[name][1]
    return torch.randint(9, shape) if name == "embedding" else torch.randn(shape, dtype=dtype)


def written_out(name: str, model: nn.Sequential, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """y of W0 + ΔW in float64 with ΔW by its definition, and the gradients of Σ sin(y)."""
    host, adapter = model[0], model[0].adapter
    parts = {name: p.detach().double().requires_grad_() for name, p in adapter.named_parameters()}
    order = ["lora_core", "lora_A", "lora_B", *sorted(n for n in parts if n.startswith("lora_K"))]
    assert sorted(order) == sorted(parts)
    delta = adapter.scaling * torch.einsum(LAYERS[name][2], *(parts[part] for part in order))
    plain = LAYERS[name][0]().double()
    weights = {"weight": host.weight.double() + delta}
    if getattr(host, "bias", None) is not None:
        weights["bias"] = host.bias.double()
    x = x if name == "embedding" else x.double()
    y = torch.func.functional_call(plain, weights, (x,))
    y.sin().sum().backward()
    return y.detach(), {name: part.grad for name, part in parts.items()}


def computed(model: nn.Sequential, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    y = model(x)
    y.double().sin().sum().backward()
    return y.detach(), {name: p.grad for name, p in model[0].adapter.named_parameters()}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_its_definition(name: str, ranks: str) -> None:
    """T1, and every gradient by autograd through the formed ΔW."""
    model, x = layer(name, ranks), inputs(name)
    y, gradients = computed(model, x)
    wanted, wanted_gradients = written_out(name, model, x)
    assert relative_error(y, wanted) < 1e-13
    for part, gradient in wanted_gradients.items():
        assert relative_error(gradients[part], gradient) < 1e-12, part


@pytest.mark.parametrize("name", LAYERS)
def test_it_starts_at_zero_with_a_gradient_of_the_core_alone(name: str) -> None:
    """T2."""
    torch.manual_seed(1)
    model, x = nn.Sequential(LAYERS[name][0]()), inputs(name, torch.float32)
    before = model(x).detach()
    attach(model, FloraConfig(r=3, target_modules=["0"]))
    y, gradients = computed(model, x)
    assert torch.equal(y, before)
    assert gradients.pop("lora_core").abs().min() > 0
    assert len(gradients) >= 2 and not any(gradient.any() for gradient in gradients.values())


def test_factors_start_as_the_authors_do() -> None:
    """Kaiming-normal of slope √3 over a factor's columns: variance 2/(1 + 3)/r."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3000, 2000, 300))
    attach(model, FloraConfig(r=8, flora_r_out=4, flora_kernel_r=20, target_modules=["0"]))
    model[0].adapter.to_empty(device="cpu")
    model[0].adapter.reset(is_embedding=False, init=None)
    for factor, r in {"lora_A": 8, "lora_B": 4, "lora_K0": 20, "lora_K1": 20}.items():
        values = model[0].adapter.get_parameter(factor).detach()
        assert r in values.shape
        assert float(values.std()) == pytest.approx((2 * r) ** -0.5, rel=0.03), factor
        reference = torch.empty(100_000 // r, r)
        nn.init.kaiming_normal_(reference, a=3**0.5)
        assert float(values.std()) == pytest.approx(float(reference.std()), rel=0.03), factor


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("ranks", RANKS)
def test_peft_loads_it_as_a_lora_of_the_same_output(dims: int, ranks: str, tmp_path: Path) -> None:
    """T3 for convolutions and linear layers, with a rank and a scale of its own here and there."""
    r, r_out, kernel_r = RANKS[ranks]
    config = FloraConfig(
        r=r,
        flora_r_out=r_out,
        flora_kernel_r=kernel_r,
        target_modules=TARGETS,
        rank_pattern={"down": 5, "to_q": 1},
        alpha_pattern={"conv_in": 7},
        use_rslora=dims == 2,
    )
    model = attach(unet(dims), config)
    randomize_trainable(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(unet(dims), tmp_path)
    x, times, _ = noisy(dims)
    with torch.no_grad():
        assert relative_error(theirs(x, times), model(x, times)) < 1e-5
        assert relative_error(unet(dims)(x, times), model(x, times)) > 0.01
    ranks_there = {p: m.r["default"] for p, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert ranks_there["base_model.model.down"] == (r_out or 5)  # P_out's, in a convolution
    assert ranks_there["base_model.model.blocks.0.to_q"] == 1  # the lesser of the two


@pytest.mark.parametrize("kind", ["llama", "gpt2", "tied"])
def test_peft_loads_it_for_language_models(kind: str, tmp_path: Path) -> None:
    words = {"gpt2": ["c_attn", "c_fc", "wte"], "tied": ["up_proj", "embed_tokens", "lm_head"]}
    targets = words.get(kind, "all-linear")
    model = attach(causal_model(kind), FloraConfig(r=3, flora_r_out=2, target_modules=targets))
    randomize_trainable(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(causal_model(kind), tmp_path)
    assert relative_error(logits(theirs), logits(model)) < 1e-5


def test_a_plain_lora_is_not_loaded_into_it(tmp_path: Path) -> None:
    save_adapter(attach(unet(), LoraConfig(r=2, target_modules=TARGETS)), tmp_path)
    model = attach(unet(), FloraConfig(r=2, target_modules=TARGETS))
    with pytest.raises(UsageError, match="is a plain LoRA, but the model has flora"):
        load_adapter(model, tmp_path)


def test_the_smaller_rank_is_written_and_computed_with() -> None:
    for m, n, r, r_out, wanted in ((8, 20, 3, 2, 2), (8, 20, 2, 3, 2), (20, 8, 2, 2, 2)):
        model = nn.Sequential(nn.Linear(n, m))
        attach(model, FloraConfig(r=r, flora_r_out=r_out, target_modules=["0"]))
        adapter = model[0].adapter
        assert adapter.as_lora().r == wanted
        core_in_a = adapter.factors()[1] is adapter.lora_B  # the core goes where it is cheaper
        assert core_in_a == (r_out < r or n < m)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_with_a_core_of_ones_on_the_diagonal_it_is_the_golden_lora(dtype: torch.dtype) -> None:
    """T4: output, formed weight and gradients of P_in and P_out."""
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    model = nn.Sequential(nn.Linear(5, 4, bias=False)).to(dtype)
    attach(model, FloraConfig(r=2, lora_alpha=16, target_modules=["0"]))
    adapter, x = model[0].adapter, torch.tensor(X, dtype=dtype)
    with torch.no_grad():
        for slot, values in ((model[0].weight, W0), (adapter.lora_A, A), (adapter.lora_B, B)):
            slot.copy_(torch.tensor(values, dtype=dtype))
        adapter.lora_core.copy_(torch.eye(2))
    y = model(x)
    assert_is(y, Y, tolerance)
    assert_is(model[0].weight + adapter.delta(), MERGED, tolerance)
    (y.square().sum() / 2).backward()
    for name, expected in HALF_SQUARE.items():
        assert_is(adapter.get_parameter(name).grad, expected, tolerance)


@pytest.mark.parametrize("name", ["linear", "2d"])
def test_with_such_a_core_it_is_lora_bit_for_bit(name: str) -> None:
    host, x = LAYERS[name][0], inputs(name, torch.float32)
    outputs = []
    for config in (FloraConfig, LoraConfig):
        torch.manual_seed(2)
        model = nn.Sequential(host())
        attach(model, config(r=3, lora_alpha=5, target_modules=["0"]))
        adapter = model[0].adapter
        with torch.no_grad():
            torch.manual_seed(8)
            P_in, P_out = torch.randn(3, N), torch.randn(M, 3)
            adapter.lora_B.copy_(P_out)
            if config is LoraConfig:
                kernel = model[0].weight.shape[2:]
                unfolded = torch.zeros(3, N, *kernel)
                unfolded[(..., *(0 for _ in kernel))] = P_in
                adapter.lora_A.copy_(unfolded.flatten(1))
            else:
                adapter.lora_A.copy_(P_in)
                adapter.lora_core.zero_()
                corner = tuple(0 for _ in adapter.kernel)
                adapter.lora_core[(..., *corner)] = torch.eye(3)
                for index, size in enumerate(adapter.kernel):
                    adapter.get_parameter(f"lora_K{index}").copy_(torch.eye(size))
        outputs.append(model(x))
    assert torch.equal(*outputs)


def test_loraplus_has_core_and_p_out_at_b_s_rate() -> None:
    named = trainable_parameters(attach(unet(), FloraConfig(r=2, target_modules=TARGETS)))
    names = {id(parameter): name for name, parameter in named.items()}
    groups = parameter_groups(named, lr=1.0, loraplus_lr_ratio=16.0, weight_decay=0.1)
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates.keys() == named.keys()
    for name, rate in rates.items():
        assert rate == (16.0 if name.endswith(("lora_B", "lora_core")) else 1.0), name


def test_pairs_are_refused_even_where_the_core_has_as_many_elements_as_a_row() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    attach(model, FloraConfig(r=4, target_modules=["0"]))
    with pytest.raises(UsageError, match="^LoraPro: the adapter at 0 has lora_core beside A and B"):
        _ = shard(model).pairs


def test_patterns_and_ranks_reach_every_factor() -> None:
    config = FloraConfig(r=4, flora_kernel_r=2, target_modules=TARGETS, rank_pattern={"down": 3})
    model = attach(unet(), config)
    shapes = {
        path: {name: tuple(p.shape) for name, p in adapter.named_parameters()}
        for path, _, adapter in named_adapters(model)
    }
    assert shapes["down"] == {
        "lora_A": (3, 6),
        "lora_B": (12, 3),
        "lora_core": (3, 3, 2, 2),
        "lora_K0": (2, 2),
        "lora_K1": (2, 2),
    }
    assert shapes["conv_in"]["lora_core"] == (4, 4, 2, 2)
    assert shapes["conv_in"]["lora_K1"] == (3, 2)
    assert shapes["blocks.0.mix"]["lora_core"] == (4, 4, 1, 1)  # the kernel is one place
    assert shapes["time"] == {"lora_A": (4, 5), "lora_B": (12, 4), "lora_core": (4, 4)}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "r_out": ({"flora_r_out": 0}, "flora_r_out: must be >= 1, got 0"),
    "kernel": ({"flora_kernel_r": 1.5}, "flora_kernel_r: expected int or null"),
    "bool": ({"flora_r_out": True}, "flora_r_out: expected int or null"),
    "init": ({"init_lora_weights": "gaussian"}, "init_lora_weights: flora has its own"),
    "dora": ({"use_dora": True}, "use_dora: DoRA needs a plain LoRA, not flora"),
    "no kernel": ({"flora_kernel_r": 2, "target_modules": ["time"]},
                  "flora_kernel_r: 2 cannot act: no convolution is adapted"),
    "no larger kernel": ({"flora_kernel_r": 3, "target_modules": TARGETS},
                         "flora_kernel_r: 3 cannot act: no kernel is larger than 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case: str) -> None:
    settings, message = REFUSED[case]
    model = unet()
    assert refusal(lambda: attach(model, FloraConfig(**settings))).startswith(message)
    assert not hasattr(model, "dlora") and all(p.requires_grad for p in model.parameters())
