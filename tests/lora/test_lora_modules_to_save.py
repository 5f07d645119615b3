"""`modules_to_save`: a trained float32 copy beside the frozen original."""

import pytest
import torch
from causal_models import causal_model, randomize_trainable, token_ids
from torch import nn

from dlora import LoraConfig, attach, disabled
from dlora.lora.attach import trainable_parameters

SAVED = {
    "head": ("llama", ["lm_head"], ["lm_head.weight"]),
    "tied head": ("tied", ["lm_head"], ["lm_head.weight"]),
    "embedding": ("llama", ["embed_tokens"], ["model.embed_tokens.weight"]),
    "tied embedding": ("tied", ["embed_tokens"], ["model.embed_tokens.weight"]),
    "norm": ("llama", ["model.norm"], ["model.norm.weight"]),
    "norm with bias": ("gpt2", ["ln_f"], ["transformer.ln_f.weight", "transformer.ln_f.bias"]),
    "a block": (
        "gpt2",
        ["1.mlp"],
        [f"transformer.h.1.mlp.{c}.{p}" for c in ("c_fc", "c_proj") for p in ("weight", "bias")],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SAVED)
def test_the_copy_starts_as_the_base_and_is_what_trains(case: str, dtype: torch.dtype) -> None:
    kind, names, weights = SAVED[case]
    model, ids = causal_model(kind, dtype), token_ids()
    expected = model(ids).logits
    base = {weight: model.get_parameter(weight).detach().clone() for weight in weights}
    attach(model, LoraConfig(target_modules=[], modules_to_save=names))
    trained = trainable_parameters(model)
    owners = {w: next(s for s in model.dlora.saved if w.startswith(f"{s}.")) for w in weights}
    copies = {w: f"{owner}.adapter{w.removeprefix(owner)}" for w, owner in owners.items()}
    assert set(trained) == set(copies.values())
    for weight, copy in copies.items():
        assert trained[copy].dtype == torch.float32
        assert torch.equal(trained[copy].to(dtype), base[weight])
    assert torch.equal(model(ids).logits, expected)

    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(trained.values(), lr=0.1).step()
    for weight, copy in copies.items():
        assert not torch.equal(trained[copy], base[weight].float()), copy
        assert model.get_parameter(weight).grad is None
        assert torch.equal(model.get_parameter(weight), base[weight]), weight
    assert not torch.equal(model(ids).logits, expected)
    with disabled(model):
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_gradients_of_the_copy_are_those_of_the_module_itself(kind: str) -> None:
    """Of a tied weight, only the head's part: the embedding stays frozen."""
    ids = token_ids()
    plain = causal_model(kind, torch.float64)
    plain.requires_grad_(False)
    plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach().clone())
    plain(ids, labels=ids).loss.backward()
    model = causal_model(kind, torch.float64)
    attach(model, LoraConfig(target_modules=[], modules_to_save=["lm_head"]))
    model(ids, labels=ids).loss.backward()
    copy = model.lm_head.adapter.weight
    torch.testing.assert_close(copy.grad, plain.lm_head.weight.grad, rtol=1e-12, atol=1e-15)


def test_the_base_computes_with_its_own_parameters_again_after_an_error() -> None:
    model = causal_model("llama")
    attach(model, LoraConfig(target_modules=[], modules_to_save=["lm_head"]))
    own = model.lm_head.weight
    with pytest.raises(RuntimeError):
        model.lm_head(torch.zeros(2, 3))
    assert model.lm_head.weight is own


def test_modules_to_save_go_before_targets_and_have_no_adapters() -> None:
    model = causal_model("llama")
    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["0.mlp", "lm_head"])
    attach(model, config)
    assert model.dlora.saved == ["model.layers.0.mlp", "lm_head"]
    projections = [path for path in model.dlora.adapted if "mlp" in path]
    assert projections == [f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")]
    randomize_trainable(model)
    model(token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad is not None for p in trainable_parameters(model).values())
