"""What differs from PEFT: each difference that `docs/beside_peft.md` lists is shown."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from causal_models import quiet_peft, randomize_trainable, relative_error
from peft_differences import DIFFERENCES
from peft_models import batch, model_of, output_of
from peft_twins import in_peft, twins
from refusals import refusal
from safetensors.torch import load_file
from torch import nn

from dlora import LoraConfig, UsageError, attach, load_adapter, merge, save_adapter, unmerge
from dlora.adapters.write import WEIGHTS
from dlora.lora.attach import trainable_parameters

pytestmark = quiet_peft
UP: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["up"]}
CHECKS: dict[str, Callable[[Path], None]] = {}


def shows(name: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Marks the function that shows the difference of that name."""

    def marked(check: Callable[[Path], None]) -> Callable[[Path], None]:
        CHECKS[name] = check
        return check

    return marked


def ours(name: str, settings: dict[str, Any], **others: Any) -> Any:
    """A model of the table with an adapter by PEFT's settings, moved away from its start."""
    model = attach(model_of(name), peft.LoraConfig(**settings, **others))
    randomize_trainable(model)
    return model


@shows("the model")
def _(_: Path) -> None:
    model, theirs = model_of("mlp"), in_peft("mlp", UP)
    assert attach(model, peft.LoraConfig(**UP)) is model
    assert isinstance(model.up, nn.Linear) and repr(model.up).startswith("AdaptedLinear(")
    assert isinstance(theirs, peft.PeftModel)
    assert not isinstance(theirs.base_model.model.up, nn.Linear)
    assert repr(theirs.base_model.model.up).startswith("lora.Linear(")
    for shown in (repr(model.up), repr(theirs.base_model.model.up)):
        assert "in_features=12, out_features=20" in shown


@shows("state_dict")
def _(_: Path) -> None:
    theirs, here = in_peft("mlp", UP).state_dict(), ours("mlp", UP).state_dict()
    assert "base_model.model.up.base_layer.weight" in theirs
    assert set(here) == {*model_of("mlp").state_dict(), "up.adapter.lora_A", "up.adapter.lora_B"}


@shows("seed")
def _(_: Path) -> None:
    settings = {"target_modules": ["up"], "r": 64}
    torch.manual_seed(1)
    A = attach(model_of("mlp"), peft.LoraConfig(**settings)).up.adapter.lora_A
    torch.manual_seed(1)
    theirs = peft.get_peft_model(model_of("mlp"), peft.LoraConfig(**settings))
    other = theirs.base_model.model.up.lora_A["default"].weight
    assert not torch.equal(A, other)
    assert A.std().item() == pytest.approx(other.std().item(), rel=0.15)
    assert A.abs().max() <= 12**-0.5 and other.abs().max() <= 12**-0.5


@shows("dropout")
def _(tmp_path: Path) -> None:
    model, theirs = twins("mlp", UP | {"lora_dropout": 0.4}, tmp_path)
    x = batch(model)
    outputs = []
    for each in (model.train(), theirs.train()):
        torch.manual_seed(2)
        outputs.append(output_of(each, x))
    assert relative_error(*outputs) > 1e-3
    assert relative_error(output_of(model.eval(), x), output_of(theirs.eval(), x)) < 1e-11


@shows("half")
def _(tmp_path: Path) -> None:
    model, theirs = twins("mlp", UP, tmp_path, torch.bfloat16)
    x = batch(model, torch.bfloat16)
    assert 0 < relative_error(output_of(model, x), output_of(theirs, x)) < 0.02
    for each in (model, theirs):
        assert {p.dtype for p in each.parameters() if p.requires_grad} == {torch.float32}


@shows("saved in half")
def _(tmp_path: Path) -> None:
    settings = UP | {"modules_to_save": ["down"]}
    model, theirs = twins("mlp", settings, tmp_path, torch.float16)
    assert theirs.base_model.model.down.modules_to_save["default"].weight.dtype == torch.float16
    assert model.down.adapter.weight.dtype == torch.float32


@shows("unmerge in half")
def _(tmp_path: Path) -> None:
    model, theirs = twins("mlp", UP, tmp_path, torch.bfloat16)
    before, layer = model.up.weight.clone(), theirs.base_model.model.up
    merge(model)
    theirs.merge_adapter()
    assert torch.equal(model.up.weight, layer.get_base_layer().weight)
    unmerge(model)
    theirs.unmerge_adapter()
    assert torch.equal(model.up.weight, before)
    assert 0 < relative_error(layer.get_base_layer().weight, before) < 0.02


@shows("tied")
def _(tmp_path: Path) -> None:
    model, theirs = twins("tied", UP | {"target_modules": ["embed_tokens"]}, tmp_path)
    x, head = batch(model), model.lm_head.weight.clone()
    before = output_of(model, x)
    merge(model)
    theirs.merge_adapter()
    assert torch.equal(model.lm_head.weight, head)
    assert not torch.equal(theirs.base_model.model.lm_head.weight, head)
    assert relative_error(output_of(model, x), before) < 1e-11
    assert relative_error(output_of(theirs, x), before) > 1e-3


@shows("pixels")
def _(tmp_path: Path) -> None:
    model, theirs = twins("pixels 3d", UP | {"target_modules": ["conv"]}, tmp_path)
    with pytest.raises(RuntimeError, match="must match the size"):
        theirs.merge_adapter()
    x = batch(model)
    before = output_of(model, x)
    assert relative_error(output_of(merge(model), x), before) < 1e-11


@shows("safe merge")
def _(tmp_path: Path) -> None:
    model, theirs = twins("deep", UP, tmp_path)
    base = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.body.layers[2].up.adapter.lora_B[0, 0] = float("inf")
        theirs.base_model.model.body.layers[2].up.lora_B["default"].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaNs detected"):
        theirs.merge_adapter(safe_merge=True)
    assert refusal(model.merge_adapter) == (
        "merge: body.layers.2.up: W0 + ΔW has NaN or infinite values in float64; nothing was merged"
    )
    own = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert all(torch.equal(p, base[name]) for name, p in own.items())
    with torch.no_grad():
        model.body.layers[2].up.adapter.lora_B[0, 0] = 0
    merge(model)


@shows("disabled")
def _(tmp_path: Path) -> None:
    model, theirs = (each.eval() for each in twins("mlp", UP, tmp_path))
    for each in (model, theirs):
        each.merge_adapter()
    with theirs.disable_adapter():
        output_of(theirs, batch(model))
    assert not theirs.base_model.model.up.merged
    with pytest.raises(UsageError, match="^disabled: this model is merged; call dlora.unmerge"):
        model.disable_adapter().__enter__()


@shows("unload")
def _(_: Path) -> None:
    assert type(in_peft("mlp", UP).unload()) is type(model_of("mlp"))
    model = ours("mlp", UP)
    for call in ("merge_and_unload", "unload"):
        assert refusal(getattr(model, call)).startswith(f"{call}: dlora adapters stay attached; ")


@shows("unknown name")
def _(_: Path) -> None:
    settings = UP | {"target_modules": ["up", "nowhere"]}
    assert in_peft("mlp", settings)
    with pytest.warns(UserWarning, match="target_modules: 'nowhere' matches no module.*ignored"):
        attach(model_of("mlp"), peft.LoraConfig(**settings))
    assert "'nowhere' matches no" in refusal(attach, model_of("mlp"), LoraConfig(**settings))


@shows("saved alone")
def _(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"target_modules": [], "modules_to_save": ["down"]}
    with pytest.raises(ValueError, match="No `target_modules`|No modules were targeted"):
        peft.get_peft_model(model_of("mlp"), peft.LoraConfig(**settings))
    model = ours("mlp", settings)
    save_adapter(model, tmp_path)
    theirs, x = peft.PeftModel.from_pretrained(model_of("mlp"), tmp_path), batch(model, rows=3)
    assert relative_error(output_of(theirs, x.float()), output_of(model, x.float())) < 1e-6


@shows("sparse")
def _(_: Path) -> None:
    wanted = ours("words", {"target_modules": ["embed"]})
    sparse = copy.deepcopy(model_of("words"))
    sparse.embed.sparse = True
    model = attach(copy.deepcopy(sparse), peft.LoraConfig(target_modules=["embed"]))
    randomize_trainable(model)
    x = batch(model)
    for each in (model, wanted):
        output_of(each, x).square().sum().backward()
    for name, parameter in trainable_parameters(model).items():
        assert torch.equal(parameter.grad, trainable_parameters(wanted)[name].grad)
    theirs = peft.get_peft_model(sparse, peft.LoraConfig(target_modules=["embed"]))
    randomize_trainable(theirs)
    with pytest.raises(RuntimeError, match="sparse"):
        output_of(theirs, x).square().sum().backward()


@shows("all-linear")
def _(_: Path) -> None:
    settings = {"target_modules": "all-linear"}
    theirs = in_peft("attention", settings)
    output_of(theirs, batch(theirs, torch.float32)).sum().backward()
    adapter = theirs.base_model.model.mha.out_proj
    assert adapter.lora_A["default"].weight.grad is None
    model = model_of("attention")
    with pytest.warns(UserWarning, match="all-linear leaves 1 linear layers? alone .out_proj"):
        attach(model, peft.LoraConfig(**settings))
    assert model.dlora.adapted == ["head"]


@shows("patterns")
def _(tmp_path: Path) -> None:
    pattern = {"layers.1.up": 2, ".*.up": 3}
    settings = UP | {"rank_pattern": pattern}
    in_peft("deep", settings).save_pretrained(tmp_path / "theirs")
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(model_of("deep"), tmp_path / "theirs")
    model = ours("deep", settings)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(model_of("deep"), tmp_path / "ours")
    assert theirs.base_model.model.body.layers[1].up.r["default"] == 2


@shows("embedding copies")
def _(tmp_path: Path) -> None:
    """Also of one that is not adapted, as PEFT adds it where the vocabulary was resized."""
    key, x = "base_model.model.embed.{}weight", batch(model_of("words"))
    for name, inner in {"embed": "base_layer.", "mix": ""}.items():
        theirs, at = in_peft("words", UP | {"target_modules": [name]}), tmp_path / name
        theirs.save_pretrained(at, save_embedding_layers=True)
        stored = load_file(at / WEIGHTS)
        assert key.format(inner) in stored
        model = load_adapter(model_of("words"), at)
        assert relative_error(output_of(model, x), output_of(theirs, x)) < 1e-6
        save_adapter(model, tmp_path / "ours")
        assert key.format(inner) not in load_file(tmp_path / "ours" / WEIGHTS)
        other = model_of("words")
        nn.init.ones_(other.embed.weight)
        assert "differs from this model's weight" in refusal(load_adapter, other, at)


@shows("pickle")
def _(tmp_path: Path) -> None:
    in_peft("mlp", UP).save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    model = ours("mlp", UP)
    said = refusal(model.save_pretrained, tmp_path, safe_serialization=False)
    assert said.startswith("save_pretrained: safe_serialization=False cannot act")


class Keywords(nn.Module):
    """Calls each of its layers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(9, 4), nn.Conv1d(4, 4, 2)
        self.up = nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.up(input=self.mix(input=self.embed(input=ids).mT).mT)


@shows("keyword")
def _(_: Path) -> None:
    ids, settings = torch.arange(9)[None], {"target_modules": ["embed", "mix", "up"]}
    base = Keywords()
    assert torch.equal(attach(copy.deepcopy(base), LoraConfig(**settings))(ids), base(ids))
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        peft.get_peft_model(base, peft.LoraConfig(**settings))(ids)


def test_every_difference_is_shown() -> None:
    assert CHECKS.keys() == DIFFERENCES.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_it_differs_as_the_page_says(name: str, tmp_path: Path) -> None:
    CHECKS[name](tmp_path)
