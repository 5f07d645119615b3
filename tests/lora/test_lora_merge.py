"""`merge` writes W0 + ΔW, says what rounding took of it, and `unmerge` gives W0 back."""

import warnings

import pytest
import torch
from causal_models import causal_model, logits, randomize_trainable, relative_error
from torch import nn

from dlora import LoraConfig, UsageError, attach, disabled, merge, unmerge
from dlora.lora.attach import named_adapters
from dlora.lora.merge import merged_weight
from dlora.lora.states import AdapterState
from dlora.lora.variants.adalora import AdaLoraAdapter, AdaLoraConfig

EVERYTHING = {
    "llama": ["q_proj", "down_proj", "embed_tokens", "lm_head"],
    "tied": ["v_proj", "embed_tokens", "lm_head"],
    "gpt2": ["c_attn", "c_proj", "wte"],
}
quiet = pytest.mark.filterwarnings("ignore:merge. rounding")


def adapted(kind: str, dtype: torch.dtype = torch.float32, **settings: object) -> nn.Module:
    model = causal_model(kind, dtype).eval()
    settings.setdefault("target_modules", EVERYTHING.get(kind))
    attach(model, LoraConfig(r=3, lora_alpha=6, **settings))
    randomize_trainable(model)
    return model


@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", EVERYTHING)
def test_unmerge_restores_every_bit(kind: str, dtype: torch.dtype) -> None:
    model = adapted(kind, dtype, modules_to_save=["ln_f" if kind == "gpt2" else "norm"])
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    expected = logits(model)
    merge(model)
    if dtype == torch.float32:
        assert relative_error(logits(model), expected) < 1e-5
    for path in (*model.dlora.adapted, *model.dlora.saved):
        weight = model.get_submodule(path).weight
        assert not torch.equal(weight, before.get(f"{path}.weight", (None, weight[:0]))[1]), path
    unmerge(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, value) in before.items():
        assert after[name] is parameter, name
        assert torch.equal(parameter, value), name
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_merged_weight_is_rounded_once(base_dtype: torch.dtype) -> None:
    """The sum is taken in float32 and cast, not taken in the base's dtype."""
    torch.manual_seed(0)
    weight, delta = torch.randn(64, 48).to(base_dtype), torch.randn(64, 48) * 0.01
    exact = weight.double() + delta.double()
    merged = merged_weight(weight, delta)
    assert torch.equal(merged.weight, exact.float().to(base_dtype))
    lost = (merged.weight.double() - weight.double() - delta.double()).norm() / delta.norm()
    assert merged.loss == pytest.approx(float(lost), rel=1e-4, abs=1e-7)


# methods.md, section 1: what rounding to bfloat16 takes of ΔW by ‖ΔW‖/‖W0‖.
@pytest.mark.parametrize(
    ("ratio", "loss"), [(1e-1, 0.017), (1e-2, 0.16), (1e-3, 0.79), (1e-4, 0.98)]
)
def test_the_measured_loss_is_the_published_one(ratio: float, loss: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 512).to(torch.bfloat16)
    delta = torch.randn(512, 16) @ torch.randn(16, 512)
    delta *= ratio * weight.float().norm() / delta.norm()
    assert merged_weight(weight, delta).loss == pytest.approx(loss, rel=0.1)


@pytest.mark.parametrize(
    ("dtype", "size", "warns"),
    [
        (torch.bfloat16, 0.01, True),
        (torch.bfloat16, 10.0, False),
        (torch.float32, 0.01, False),
        (torch.bfloat16, 0.0, False),
    ],
    ids=str,
)
def test_merge_warns_where_rounding_takes_more_than_one_percent(
    dtype: torch.dtype, size: float, warns: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).to(dtype)
    attach(model, LoraConfig(r=4, lora_alpha=4, target_modules=["1"]))
    adapter = model[1].adapter
    with torch.no_grad():
        adapter.lora_B.normal_()
        adapter.lora_B *= size * model[1].weight.float().norm() / adapter.delta().norm()
        expected = model[1].weight.double() + adapter.delta().double()
        lost = (expected.to(dtype).double() - expected).norm() / adapter.delta().norm()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merge(model)
    messages = [str(w.message) for w in caught]
    assert len(messages) == warns
    if warns:
        assert f"1 of 1 weights (worst: {float(lost):.1%} in 1)" in messages[0]


@pytest.mark.parametrize(
    ("target", "untouched"), [("embed_tokens", "lm_head"), ("lm_head", "model.embed_tokens")]
)
def test_merging_one_of_two_tied_modules_leaves_the_other(target: str, untouched: str) -> None:
    model = adapted("tied", target_modules=[target])
    expected = logits(model)
    tied = model.lm_head.weight
    before = tied.detach().clone()
    merge(model)
    assert model.get_parameter(f"{untouched}.weight") is tied
    assert torch.equal(tied, before)
    assert relative_error(logits(model), expected) < 1e-5
    unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight is tied


def test_merging_a_shared_layer_adds_the_update_once() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    attach(model, LoraConfig(r=2))
    randomize_trainable(model)
    x = torch.randn(5, 8)
    expected = model(x)
    torch.testing.assert_close(merge(model)(x), expected, rtol=1e-5, atol=1e-6)


def test_merged_copies_of_modules_to_save_are_not_the_masters() -> None:
    """Training goes on from the masters; a merged model must not change with them."""
    model = adapted("llama", target_modules=[], modules_to_save=["lm_head"])
    expected = logits(model)
    merge(model)
    assert torch.equal(logits(model), expected)
    with torch.no_grad():
        model.lm_head.adapter.weight.zero_()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([merge, merge], "merge: this model is merged already"),
        ([unmerge], "unmerge: this model is not merged"),
        ([merge, unmerge, unmerge], "unmerge: this model is not merged"),
        ([merge, lambda m: disabled(m).__enter__()], "disabled: this model is merged"),
    ],
)
def test_merging_in_the_wrong_order_is_an_error(calls: list, message: str) -> None:
    model = adapted("llama", target_modules=["q_proj"])
    for call in calls[:-1]:
        call(model)
    with pytest.raises(UsageError, match=message):
        calls[-1](model)


def test_merging_a_model_without_adapters_is_an_error() -> None:
    with pytest.raises(UsageError, match="has no dlora adapters"):
        merge(nn.Sequential(nn.Linear(2, 2)))


@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", EVERYTHING)
def test_disabled_is_the_base_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    base = logits(causal_model(kind, dtype).eval())
    model = adapted(kind, dtype)
    with disabled(model):
        assert torch.equal(logits(model), base)
        with disabled(model):
            pass
        assert torch.equal(logits(model), base)  # an inner context does not switch it on
    on = logits(model)
    assert not torch.equal(on, base)
    merge(model)
    unmerge(model)
    assert torch.equal(logits(model), on)
    with disabled(model):
        assert torch.equal(logits(model), base)


def test_disabled_ends_with_an_exception() -> None:
    model = adapted("llama", target_modules=["q_proj"])
    on = logits(model)
    with pytest.raises(RuntimeError, match="inside"), disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), on)


def test_unmerging_leaves_off_what_adalora_left_no_rank() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).eval()
    x = torch.randn(5, 6)
    expected = model(x).detach().clone()
    attach(model, AdaLoraConfig(init_r=2, target_r=1, target_modules=["0", "1"]))
    for _, _, adapter in named_adapters(model):
        assert isinstance(adapter, AdaLoraAdapter)
        adapter.shrink(torch.tensor([], dtype=torch.long))
    unmerge(merge(model))
    assert all(a.state is AdapterState.EMPTY for _, _, a in named_adapters(model))
    assert torch.equal(model(x), expected)
