"""`attach` on plain modules: what it adapts, what it leaves alone, what it refuses in one line."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from causal_models import causal_model, randomize, randomize_trainable
from refusals import refusal
from torch import Tensor, nn

from dlora import LoraConfig, attach, disabled
from dlora.lora.attach import trainable_parameters


def effect(model: nn.Module, *args: Tensor, **kwargs: Any) -> float:
    """How far the adapters move the output."""
    with torch.no_grad():
        on = model(*args, **kwargs)
        with disabled(model):
            off = model(*args, **kwargs)
    return float((on - off).abs().max())


class Block(nn.Module):
    """Names that are easy to confuse: a child called `adapter`, a `head` inside and one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.adapter = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.head(self.adapter(self.q_proj(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 3)
        self.empty = nn.Tanh()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.empty(self.head(x))


IDS = torch.tensor([[0, 1, 4]])
ADAPTED: dict[str, tuple[Any, list[str]]] = {
    "a name": (["q_proj"], ["blocks.0.q_proj", "blocks.1.q_proj"]),
    "the name of the child": (["adapter"], ["blocks.0.adapter", "blocks.1.adapter"]),
    "a name at two depths": (["head"], ["blocks.0.head", "blocks.1.head", "head"]),
    "paths": (["blocks.1.head", "1.q_proj"], ["blocks.1.q_proj", "blocks.1.head"]),
    "an embedding": (["table"], ["table"]),
    "an expression": (r"blocks\.[1-9]\.(q_proj|head)", ["blocks.1.q_proj", "blocks.1.head"]),
    "an expression for a whole path": ("head", ["head"]),
    "all": (
        "all-linear",
        [f"blocks.{i}.{name}" for i in (0, 1) for name in ("q_proj", "adapter", "head")] + ["head"],
    ),
}


@pytest.mark.parametrize("case", ADAPTED)
def test_targets_of_a_plain_module(case: str) -> None:
    targets, expected = ADAPTED[case]
    torch.manual_seed(0)
    model = Net()
    assert attach(model, LoraConfig(r=2, target_modules=targets)) is model
    assert model.dlora.adapted == expected
    randomize_trainable(model)
    model(IDS).sum().backward()
    trained = trainable_parameters(model)
    assert [n.removesuffix(".adapter.lora_A") for n in trained if n.endswith("lora_A")] == expected
    assert all(p.requires_grad and p.grad.any() for p in trained.values())
    others = [p for n, p in model.named_parameters() if n not in trained]
    assert not any(p.requires_grad or p.grad is not None for p in others)
    assert effect(model, IDS) > 1e-3


def test_nested_containers_are_adapted_at_every_depth() -> None:
    inner = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 5)))
    model = nn.Sequential(inner, nn.ModuleDict({"out": nn.Linear(5, 2)})["out"])
    attach(model, LoraConfig(r=1))
    assert model.dlora.adapted == ["0.0", "0.1.1", "1"]
    assert [type(m).__name__ for m in (model[0][0], model[1])] == ["AdaptedLinear"] * 2
    assert isinstance(model[1], nn.Linear)


def test_a_layer_registered_twice_has_one_adapter_that_acts_twice() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    attach(model, LoraConfig(r=2, lora_alpha=2))
    assert model.dlora.adapted == ["0"] and len(trainable_parameters(model)) == 2
    randomize_trainable(model)
    weight = shared.weight + shared.adapter.lora_B @ shared.adapter.lora_A
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), torch.relu(x @ weight.T) @ weight.T)


def encoder(depth: int, **settings: Any) -> nn.Module:
    """A torch encoder layer (depth 0), or a stack of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of stacks that will not use nested tensors
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **settings)
        return layer if depth == 0 else nn.TransformerEncoder(layer, depth)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("settings", [{}, {"activation": "gelu"}, {"norm_first": True}], ids=str)
@pytest.mark.parametrize("depth", [0, 2], ids=["layer", "stack"])
def test_fused_inference_does_not_bypass_the_adapters(
    depth: int, settings: dict, padded: bool
) -> None:
    """In eval mode without gradients torch reads the weights itself, or packs padded batches."""
    torch.manual_seed(0)
    model = encoder(depth, **settings)
    attach(model, LoraConfig(r=2))
    assert {path.rpartition(".")[2] for path in model.dlora.adapted} == {"linear1", "linear2"}
    randomize_trainable(model)
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    expected = model.train()(x, src_key_padding_mask=padding)
    model.eval()
    with torch.no_grad():
        fused = model(x, src_key_padding_mask=padding)
    kept = ~padding if padded else torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(fused[kept], expected[kept])
    assert effect(model, x, src_key_padding_mask=padding) > 1e-2


def test_other_encoders_keep_their_fused_inference() -> None:
    model = nn.ModuleDict({"encoder": encoder(2), "head": nn.Linear(8, 2)})
    attach(model, LoraConfig(r=2, target_modules=["head"]))
    assert model["encoder"].use_nested_tensor
    assert not model["encoder"].layers[0]._forward_pre_hooks


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def hooked() -> nn.Module:
    """As accelerate's `add_hook_to_module` leaves a layer: its forward is set on the instance."""
    model = Net()
    layer = model.head
    layer.forward = lambda x, forward=layer.forward: forward(x)
    return model


def twice() -> nn.Module:
    return attach(Net(), LoraConfig(r=2, target_modules=["q_proj"]))


def occupied() -> nn.Module:
    model = Net()
    model.head.adapter = nn.Identity()
    return model


def targets(*names: str, saved: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"target_modules": [*names], "modules_to_save": [*saved]}


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "twice": (twice, {}, "already has adapters"),
    "no such name": (Net, targets("q_porj"), "'q_porj' matches no module; did you mean q_proj?"),
    "one of two names": (Net, targets("q_proj", "wq"), "'wq' matches no module"),
    "candidates": (Net, targets("xyz"), "in this model: table, q_proj, adapter, head"),
    "expression": (Net, {"target_modules": r".*\.wq"}, "regular expression '.*\\\\.wq' matches no"),
    "part of a path": (Net, {"target_modules": "q_proj"}, "regular expression 'q_proj' matches no"),
    "nothing linear": (lambda: nn.Sequential(nn.ReLU()), {}, "'all-linear' matches no linear"),
    "norm": (Net, targets("norm"), "blocks.0.norm is a LayerNorm, which cannot"),
    "own forward": (lambda: nn.Sequential(OwnForward(2, 2)), targets("0"),
                    "0 is a OwnForward, which cannot carry an adapter"),
    "max_norm": (lambda: nn.Sequential(nn.Embedding(2, 2, max_norm=1.0)), targets("0"),
                 "0 is a Embedding, which cannot carry an adapter"),
    "attention": (lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)}), targets("out_proj"),
                  "MultiheadAttention reads the weight itself and never calls the layer"),
    "forward on the instance": (hooked, {}, "head has a forward set on the instance"),
    "forward of a saved one": (hooked, targets(saved=("head",)), "set on the"),
    "child called adapter": (occupied, {}, "head already has an attribute named 'adapter'"),
    "rank pattern": (Net, {"rank_pattern": {"k_proj": 2}},
                     "rank_pattern: 'k_proj' matches none of the 7"),
    "alpha pattern": (Net, {"alpha_pattern": {"proj": 2}},
                      "alpha_pattern: 'proj' matches none of the 7"),
    "saved": (Net, {"modules_to_save": ["lm_head"]},
              "modules_to_save: 'lm_head' matches no module"),
    "saved without parameters": (Net, {"modules_to_save": ["head", "empty"]},
                                 "'empty' has no parameters"),
    "saved inside saved": (Net, {"modules_to_save": ["blocks.0", "norm"]},
                           "blocks.0.norm is inside"),
    "only saved": (Net, targets("q_proj", "head", saved=("head",)),
                   "'head' matches only modules that modules_to_save trains"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(case: str) -> None:
    build, settings, message = REFUSED[case]
    model = build()
    names = list(dict(model.named_parameters()))
    assert message in refusal(attach, model, LoraConfig(r=2, **settings))
    assert list(dict(model.named_parameters())) == names  # nothing was attached by halves


OUT_OF_RANGE: dict[str, tuple[dict[str, Any], str]] = {
    "r zero": ({"r": 0}, "r: must be >= 1 and <= 65536, got 0"),
    "r negative": ({"r": -4}, "r: "),
    "r float": ({"r": 4.0}, "r: "),
    "r bool": ({"r": True}, "r: "),
    "rank pattern": ({"rank_pattern": {"q": 0}}, "rank_pattern['q']: "),
    "alpha zero": ({"lora_alpha": 0}, "lora_alpha: must be > 0"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha: "),
    "alpha pattern": ({"alpha_pattern": {"q": -1}}, "alpha_pattern['q']: "),
    "dropout one": ({"lora_dropout": 1.0}, "lora_dropout: must be >= 0 and < 1"),
    "dropout negative": ({"lora_dropout": -0.1}, "lora_dropout: "),
    "no targets": ({"target_modules": []}, "target_modules: is empty"),
    "expression": ({"target_modules": "q_proj("}, "target_modules: 'q_proj(' is not a regular"),
    "rank expression": ({"rank_pattern": {"*": 2}}, "rank_pattern: '*' is not a regular"),
    "init": ({"init_lora_weights": "eva"}, "init_lora_weights: expected one of "),
    "odd rank": ({"init_lora_weights": "orthogonal", "rank_pattern": {"q": 3}},
                 "init_lora_weights: orthogonal needs an even LoRA rank, got 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_settings_out_of_range_name_the_field(case: str) -> None:
    settings, message = OUT_OF_RANGE[case]
    assert refusal(LoraConfig, **settings).startswith(message)


def test_attaching_on_the_meta_device_makes_no_tensor() -> None:
    """How the plan learns the adapters' sizes before any weight is read."""
    with torch.device("meta"):
        model = Net()
    attach(model, LoraConfig(r=2, target_modules=["q_proj", "table"], modules_to_save=["norm"]))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert trainable_parameters(model)["table.adapter.lora_A"].shape == (2, 5)


def test_the_state_dict_has_the_base_s_names_and_loads_the_base() -> None:
    """Checkpoints of the unadapted model fit the adapted one."""
    torch.manual_seed(0)
    plain, model = Net(), Net()
    randomize(plain, seed=8)
    attach(model, LoraConfig(r=2))
    keys = set(model.state_dict()) - set(trainable_parameters(model))
    assert keys == set(plain.state_dict())
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing.missing_keys) == set(trainable_parameters(model))
    assert torch.equal(model(IDS), plain(IDS))


def test_a_model_in_eval_mode_has_its_adapters_in_eval_mode() -> None:
    model = attach(causal_model("llama").eval(), LoraConfig(r=2, lora_dropout=0.5))
    assert not any(module.training for module in model.modules())
