"""Cases of PEFT's tests with forms of their own: AdaLoRA, recomputation, Python's operators."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from causal_models import quiet_peft, randomize_trainable, relative_error
from peft_cases import ADALORA
from peft_models import batch, model_of, output_of
from peft_twins import EXACT, check_pass, check_same, twins
from torch import Tensor, nn

from dlora import LoraConfig, attach, merge, save_adapter, unmerge
from dlora.lora.attach import trainable_parameters

pytestmark = quiet_peft


@pytest.mark.parametrize("name", ADALORA)
def test_adalora_computes_steps_saves_and_merges_as_in_peft(name: str, tmp_path: Path) -> None:
    """PEFT's E is scaled by lora_alpha / (init_r + 1e-5), which is set to init_r here."""
    found = ADALORA[name]
    config = peft.AdaLoraConfig(**{"init_r": 4, "target_r": 2, "total_step": 20, **found.settings})
    theirs: Any = peft.get_peft_model(model_of(found.model), copy.deepcopy(config)).double()
    ours = attach(model_of(found.model).double(), config)
    assert ours.get_nb_trainable_parameters()[0] == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad
    )
    randomize_trainable(ours)
    reference, places = dict(theirs.named_parameters()), {}
    for own in trainable_parameters(ours):
        path, _, inner = own.partition(".adapter.")
        saved = f"{path}.modules_to_save.default.{inner}"
        places[own] = (
            f"base_model.model.{path}.{inner}.default"
            if "lora" in inner
            else (f"base_model.model.{saved}")
        )
    assert set(places.values()) == {n for n, p in reference.items() if p.requires_grad}
    with torch.no_grad():
        for own, parameter in trainable_parameters(ours).items():
            reference[places[own]].copy_(parameter)
        for key, parameter in reference.items():
            if ".ranknum." in key:
                parameter.fill_(config.init_r - 1e-5)
    ours.eval(), theirs.eval()
    plain = theirs.base_model.model  # without the regulariser, which `dlora` adds to gradients
    inputs = [batch(ours) for _ in "ab"]
    outputs = [output_of(model, x) for model, x in zip((ours, plain), inputs, strict=True)]
    check_same(*outputs, EXACT, "output")
    for y in outputs:
        y.sin().sum().backward()
    for own, parameter in trainable_parameters(ours).items():
        check_same(parameter.grad, reference[places[own]].grad, EXACT, own)
    check_same(inputs[0].grad, inputs[1].grad, EXACT, "gradient of the input")
    save_adapter(ours, tmp_path / "own", peft_type="ADALORA")
    save_adapter(ours, tmp_path / "plain")
    with torch.no_grad():
        for form in ("own", "plain"):
            again = peft.PeftModel.from_pretrained(model_of(found.model), tmp_path / form)
            again = again.base_model.model.double().eval()
            assert relative_error(output_of(again, inputs[0]), outputs[0]) < 1e-6, form
        theirs.base_model.merge_adapter()
        check_same(output_of(merge(ours), inputs[0]), output_of(plain, inputs[0]), EXACT, "merged")
        assert torch.equal(output_of(unmerge(ours), inputs[0]), outputs[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_decoders_have_pefts_gradients(reentrant: bool, tmp_path: Path) -> None:
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    ours, theirs = twins("llama", settings, tmp_path)
    for model in (ours, theirs.base_model.model):
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    check_pass(ours, theirs)


class Written(nn.Module):
    """Uses its weight in every way in which Python has an operator for it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(len("abcd"), 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        y = (
            x @ (w + 1)
            + (2 * w - w / 3)[: len(w)].sum()
            + (1 - w).abs().mean()
            + (-w) @ x.mT.sum(1)
        )
        return y + sum(row.sum() for row in w) + (w**2).mean() + torch.where(w > 0, w, w * 0).sum()


def test_an_adapted_parameter_takes_pythons_operators(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Written()
    config = peft.LoraConfig(r=2, target_parameters=["inner.weight"])
    theirs = peft.get_peft_model(nn.ModuleDict({"inner": copy.deepcopy(base)}), config).double()
    ours: Any = nn.ModuleDict({"inner": base})
    attach(ours, LoraConfig(r=2, lora_alpha=8, target_modules=[], target_parameters=["weight"]))
    layer = theirs.base_model.model["inner"]
    layer.scaling["default"] = 4.0
    randomize_trainable(ours)
    adapter = ours["inner"].adapter.weight
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(adapter.lora_A)
        layer.lora_B["default"].weight.copy_(adapter.lora_B)
    x = torch.randn(3, 4, dtype=torch.float64)
    own, other = ours["inner"](x), layer(x)
    check_same(own, other, EXACT, "output")
    own.sum().backward()
    other.sum().backward()
    check_same(adapter.lora_A.grad, layer.lora_A["default"].weight.grad, EXACT, "A")
    check_same(adapter.lora_B.grad, layer.lora_B["default"].weight.grad, EXACT, "B")
