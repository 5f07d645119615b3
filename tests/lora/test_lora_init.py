"""Initialisations against methods.md, sections 6 to 8 and 18, float64's own SVD, and PEFT."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from golden import W0
from peft import PeftModel
from tiny import MODELS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dlora import (
    LoraConfig,
    UsageError,
    attach,
    disabled,
    load_adapter,
    merge,
    quantize,
    save_adapter,
    start_from_gradients,
    unmerge,
)
from dlora.lora.attach import named_adapters, trainable_parameters
from dlora.lora.init import INITS

IDS = torch.arange(3, 60)[None]
SHAPES = [(40, 24), (24, 40), (30, 30)]
FROM_A_MATRIX = ("pissa", "milora", "lora_ga")


def drawn(m: int, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64)


def factors(name: str, matrix: Tensor, r: int, s: float = 1.0, gamma: float = 16.0) -> Any:
    settings = {"lora_ga_gamma": gamma} if name == "lora_ga" else {}
    return INITS[name].factors(matrix, r, s, **settings)


def spectrum(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix)


@pytest.mark.parametrize("s", [1.0, 2.0, 5.657])
@pytest.mark.parametrize("shape", SHAPES)
def test_pissa_takes_the_principal_part(shape: tuple[int, int], s: float) -> None:
    """§6, T1 and T2."""
    W, r = drawn(*shape), 5
    A, B = factors("pissa", W, r, s)
    sigma = spectrum(W)
    torch.testing.assert_close(spectrum(W - s * B @ A)[0], sigma[r], rtol=1e-5, atol=0)
    torch.testing.assert_close(A.square().sum(1) * s, sigma[:r], rtol=1e-10, atol=0)
    torch.testing.assert_close(B.square().sum(0) * s, sigma[:r], rtol=1e-10, atol=0)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(s * B @ A, U[:, :r] * S[:r] @ Vh[:r], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("s", [1.0, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_milora_takes_the_minor_part(shape: tuple[int, int], s: float) -> None:
    """§7, T2, T3 and T5."""
    W, r = drawn(*shape), 5
    A, B = factors("milora", W, r, s)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    expected = S[-r:].square().sum().sqrt()
    torch.testing.assert_close((s * B @ A).norm(), expected, rtol=1e-9, atol=0)
    assert float((U[:, :-r].t() @ B).abs().max()) < 1e-6
    assert float((A @ Vh[:-r].t()).abs().max()) < 1e-6
    rest = min(shape) - r
    A_p, B_p = factors("pissa", W, rest, s)
    torch.testing.assert_close(s * (B @ A + B_p @ A_p), W, rtol=0, atol=1e-9)


def test_the_golden_example() -> None:
    """§6, T3 and §7, T2, with W0 of §18."""
    W = torch.tensor(W0, dtype=torch.float64)
    A, B = factors("pissa", W, 2, 8.0)
    assert float((W - 8 * B @ A).norm()) == pytest.approx(1.485294, abs=1e-6)
    A, B = factors("milora", W, 2, 8.0)
    assert float((8 * B @ A).norm()) == pytest.approx(1.485294, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_exact_as_the_weight(dtype: torch.dtype) -> None:
    W = (drawn(96, 64) @ torch.diag(torch.logspace(0, -3, 64).double())).to(dtype)
    for name, pick in (("pissa", slice(8)), ("milora", slice(-8, None))):
        A, B = factors(name, W, 8)
        U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        wanted = U[:, pick] * S[pick] @ Vh[pick]
        assert float((B @ A - wanted).norm() / wanted.norm()) < 1e-9


def test_a_matrix_that_lacks_rank_has_no_start_to_give() -> None:
    """§7, T4: factors that are zero would never get a gradient."""
    W = drawn(20, 6) @ drawn(6, 30, seed=1)
    assert factors("milora", W, 2) is None
    assert factors("pissa", W, 6) is not None
    assert factors("pissa", W, 7) is None
    assert factors("lora_ga", W, 3) is not None
    assert factors("lora_ga", W, 4) is None
    for broken in (torch.zeros(8, 9), torch.full((8, 9), torch.nan)):
        assert all(factors(name, broken, 2) is None for name in FROM_A_MATRIX)


@pytest.mark.parametrize("gamma", [16.0, 64.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_ga_s_first_step_is_that_of_full_fine_tuning(
    shape: tuple[int, int], gamma: float
) -> None:
    """§8, T1 and T3."""
    (m, n), r, alpha = shape, 4, 16
    G = drawn(m, n)
    A, B = factors("lora_ga", G, r, gamma=gamma)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    nearest = U[:, : 2 * r] * S[: 2 * r] @ Vh[: 2 * r]
    step = B @ B.t() @ G + G @ A.t() @ A
    wanted = m**0.5 / gamma * nearest
    assert float((step - wanted).norm() / wanted.norm()) < 1e-5
    product = alpha / r**0.5 * B @ A  # rsLoRA
    assert float(product.norm()) == pytest.approx(alpha * m**0.5 / gamma, rel=1e-9)


# -- in a model ---------------------------------------------------------------------------------


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[kind](), dtype=dtype).eval()


def summed_loss(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss * (ids.numel() - len(ids))


def started(model: Any, name: str, **settings: Any) -> Any:
    attach(model, LoraConfig(**{"r": 4, "init_lora_weights": name} | settings))
    if name == "lora_ga":
        start_from_gradients(model, [IDS, IDS + 7], summed_loss)
    return model


def nudged(model: Any) -> Any:
    """As after some training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.02 * noise).to(parameter.dtype))
    return model


class ConvNet(nn.Module):
    """What diffusion models have and language models do not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 12, padding_idx=0)
        self.conv = nn.Conv1d(12, 16, 3, padding="same")
        self.act = nn.ReLU(inplace=True)
        self.down = nn.Conv1d(16, 10, 4, stride=2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(self.act(self.conv(self.embed(ids).transpose(1, 2))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FROM_A_MATRIX)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_output_does_not_change_by_a_bit(kind: str, name: str, dtype: torch.dtype) -> None:
    model = model_of(kind, dtype)
    weights = copy.deepcopy(model.state_dict())
    before = model(IDS).logits
    started(model, name, use_rslora=True, rank_pattern={"o_proj|c_proj": 6})
    assert torch.equal(model(IDS).logits, before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    for _, _, adapter in named_adapters(model):
        assert adapter.offset_A is not None and torch.equal(adapter.offset_A, adapter.lora_A)
        assert float(adapter.lora_A.norm()) > 0 and float(adapter.lora_B.norm()) > 0
    nudged(model)
    assert not torch.equal(model(IDS).logits, before)
    with disabled(model):
        assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("name", FROM_A_MATRIX)
def test_both_factors_train_from_the_first_step(name: str) -> None:
    model = started(model_of("llama"), name)
    summed_loss(model, IDS).backward()
    for parameter in trainable_parameters(model).values():
        assert parameter.grad is not None and float(parameter.grad.norm()) > 0


@pytest.mark.parametrize("name", FROM_A_MATRIX)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_export_and_merge(kind: str, name: str, tmp_path: Path) -> None:
    """§6, T4 and §8, T5: the plain LoRA of rank 2r on the untouched base, in stock PEFT."""
    pattern = "q_proj" if kind == "llama" else "c_fc"
    model = started(
        model_of(kind), name, use_rslora=True, rank_pattern={pattern: 3}, alpha_pattern={pattern: 5}
    )
    nudged(model)
    wanted = model(IDS).logits
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(model_of(kind), tmp_path).eval()
    torch.testing.assert_close(theirs(IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    ranks = {m.r["default"] for _, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert ranks == {6, 8}
    ours = load_adapter(model_of(kind), tmp_path).eval()
    torch.testing.assert_close(ours(IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match=f"load_adapter: .* initialised with {name}"):
        load_adapter(model, tmp_path)
    merge(model)
    torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert torch.equal(model(IDS).logits, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rslora", [True, False])
def test_pissa_is_peft_s(dtype: torch.dtype, rslora: bool) -> None:
    """Products, as factors are only defined up to signs."""
    settings = {"r": 4, "lora_alpha": 6, "use_rslora": rslora, "init_lora_weights": "pissa"}
    ours, base = model_of("llama").to(dtype), model_of("llama")  # PEFT has no float64
    attach(ours, LoraConfig(target_modules="all-linear", **settings))
    theirs = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", **settings))
    for path, _, adapter in named_adapters(ours):
        layer = theirs.base_model.model.get_submodule(path)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert layer.scaling["default"] == pytest.approx(adapter.scaling)
        got = (adapter.lora_B @ adapter.lora_A).detach()
        wanted = product.detach().to(dtype)
        assert float((got - wanted).norm() / wanted.norm()) < 2e-5  # of its float32


def test_every_kind_of_host_has_its_gradient() -> None:
    """Against autograd's own, for weights that are trained."""
    torch.manual_seed(0)
    model = ConvNet().double()
    twin = copy.deepcopy(model)
    ids = torch.randint(0, 30, (3, 17))
    ids[0, :4] = 0
    (twin(ids) - 1).square().sum().backward()
    attach(
        model,
        LoraConfig(r=2, target_modules=["embed", "conv", "down"], init_lora_weights="lora_ga"),
    )
    start_from_gradients(model, [ids], lambda m, batch: (m(batch) - 1).square().sum())
    for path, host, adapter in named_adapters(model):
        weight = twin.get_parameter(f"{path}.weight").grad
        assert weight is not None
        A, B = factors("lora_ga", host.as_product(weight), 2)  # type: ignore[operator]
        for got, wanted in ((adapter.lora_A.t() @ adapter.lora_A, A.t() @ A), (adapter.lora_B, B)):
            signs = 1 if got.shape == A.t().shape else (got * wanted).sum(0).sign()
            torch.testing.assert_close(got.detach(), wanted * signs, rtol=1e-6, atol=1e-8)


def test_the_estimate_is_of_the_base_without_dropout() -> None:
    """§8, pitfall 6; modes, hooks and gradients are as before."""
    gpt2 = MODELS["gpt2"]()
    gpt2.resid_pdrop = gpt2.embd_pdrop = gpt2.attn_pdrop = 0.5
    started_models = []
    for config, dropout in ((gpt2, 0.5), (MODELS["gpt2"](), 0.0)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).train()
        started(model, "lora_ga", lora_dropout=dropout)
        assert all(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(host._forward_hooks for _, host, _ in named_adapters(model))
        started_models.append(trainable_parameters(model))
    one, other = started_models
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_layers_without_rank_start_as_usual_and_are_named() -> None:
    """§7, T4."""
    model = model_of("llama")
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight[-8:] = 0  # 70 rows of 40: still of full rank
    model.model.layers[0].self_attn.q_proj.weight.data[-1] = 0
    with pytest.warns(
        UserWarning, match="milora: 13 layers .* 1 start as with true.*0.self_attn.q_p"
    ):
        started(model, "milora")
    dead = model.model.layers[0].self_attn.q_proj.adapter
    assert float(dead.lora_B.norm()) == 0 < float(dead.lora_A.norm())
    assert float(dead.offset_A.norm()) == 0


# -- those that need no matrix -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian", "orthogonal"])
def test_random_starts_are_distributed_as_peft_s(name: str) -> None:
    n, m, r = 400, 300, 8
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(n, m))
    attach(ours, LoraConfig(r=r, target_modules=["0"], init_lora_weights=name))
    A, B = ours[0].adapter.lora_A.detach(), ours[0].adapter.lora_B.detach()  # type: ignore
    config = peft.LoraConfig(r=r, target_modules=["0"], init_lora_weights=name)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(n, m)), config).base_model.model[0]
    for got, wanted in ((A, theirs.lora_A["default"].weight), (B, theirs.lora_B["default"].weight)):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        assert float(got.std()) == pytest.approx(float(wanted.std()), rel=0.1)
        assert abs(float(got.mean())) < 0.1 * float(wanted.std()) + 1e-12
    assert float((B @ A).abs().max()) < 1e-6
    assert (float(B.norm()) > 0) is (name == "orthogonal")


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"init_lora_weights": "pissa", "r": 21}, "r: model.layers.0.self_attn.k_proj"),
        ({"init_lora_weights": "lora_ga", "r": 11}, "r: model.layers.0.self_attn.k_proj"),
        (
            {"init_lora_weights": "milora", "rank_pattern": {"down_proj": 41}},
            "rank_pattern: model.layers.0.mlp.down_proj",
        ),
        ({"lora_ga_gamma": 0.0}, "lora_ga_gamma: must be > 0"),
    ],
)
def test_a_rank_that_the_matrix_does_not_have_is_refused(
    settings: dict[str, Any], key: str
) -> None:
    model = model_of("llama")
    with pytest.raises(UsageError, match=f"^{key}"):
        attach(model, LoraConfig(**settings))
    assert not hasattr(model, "dlora")


def test_a_packed_base_is_refused() -> None:
    model = model_of("blocks")
    quantize(model, "nf4")
    with pytest.raises(UsageError, match="init_lora_weights: pissa needs the weight of .* packed"):
        attach(model, LoraConfig(r=4, init_lora_weights="pissa"))


def test_gradients_are_for_those_that_start_from_them() -> None:
    model = started(model_of("llama"), "pissa")
    with pytest.raises(UsageError, match="init_lora_weights: .* do not start from gradients"):
        start_from_gradients(model, [IDS], summed_loss)
    idle = model_of("llama")
    attach(idle, LoraConfig(r=4, init_lora_weights="lora_ga"))
    with pytest.raises(
        UsageError, match="start_from_gradients: every rank needs a batch, and some have none"
    ):
        start_from_gradients(idle, [], summed_loss)
    table = idle.get_input_embeddings()  # of which no adapted layer is a part
    with pytest.raises(UsageError, match="lora_ga: all gradients, as that of"):
        start_from_gradients(idle, [IDS], lambda m, ids: table(ids).sum().requires_grad_())
