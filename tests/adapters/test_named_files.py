"""Adapters saved and loaded by name: PEFT's multi-adapter models, and a file in another's place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import causal_model, logits, quiet_peft
from hostile import edit_json
from peft import PeftModel
from refusals import refusal
from run_training import same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlora import LoraConfig, activate, attach, attached, load_adapter, save_adapter
from dlora.lora.attach import trainable_parameters
from dlora.lora.names import active

pytestmark = quiet_peft
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "loras": (
        "llama",
        [
            {"r": 4, "target_modules": ["q_proj", "down_proj"]},
            {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
            {"r": 3, "target_modules": "all-linear", "rank_pattern": {"k_proj": 5}},
        ],
    ),
    # PEFT's second DoRA takes what the adapters before it add for the base's product.
    "dora": (
        "llama",
        [
            {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
            {"r": 2, "target_modules": ["q_proj", "v_proj"]},
        ],
    ),
    "conv1d": (
        "gpt2",
        [
            {"r": 4, "target_modules": ["c_attn", "c_proj"]},
            {"r": 2, "target_modules": ["c_attn", "wte"]},
        ],
    ),
    "embedding": (
        "llama",
        [
            {"r": 4, "target_modules": ["embed_tokens", "lm_head"]},
            {"r": 2, "target_modules": ["embed_tokens"]},
        ],
    ),
    "whole modules": (
        "llama",
        [
            {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            {"r": 2, "target_modules": ["q_proj", "v_proj"]},
        ],
    ),
}


def made(kind: str, settings: list[dict[str, Any]], **options: Any) -> Any:
    """A model with adapters `n0`, `n1`, … whose values are random."""
    model = causal_model(kind)
    for number, given in enumerate(settings):
        torch.manual_seed(number)
        attach(model, LoraConfig(**given), f"n{number}", **options)
        with torch.no_grad():
            for parameter in trainable_parameters(model, f"n{number}").values():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def values(model: Any, name: str) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainable_parameters(model, name).items()}


@pytest.mark.parametrize("case", CASES)
def test_sums_are_pefts(case: str, tmp_path: Path) -> None:
    kind, settings = CASES[case]
    model = made(kind, settings)
    names = [f"n{number}" for number in range(len(settings))]
    for name in names:
        save_adapter(model, tmp_path / name, name=name)
    theirs = PeftModel.from_pretrained(causal_model(kind), tmp_path / "n0", adapter_name="n0")
    for name in names[1:]:
        theirs.load_adapter(tmp_path / name, adapter_name=name)
    ours = causal_model(kind)
    for name in names:
        load_adapter(ours, tmp_path / name, name)
    assert all(same_bits(values(ours, name), values(model, name)) for name in names)
    for chosen in ([names[-1]], names, names[:2]):
        activate(ours, chosen)
        theirs.base_model.set_adapter(chosen)
        expected = logits(theirs)
        torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)
    with theirs.disable_adapter():
        activate(ours, [])
        torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


def test_gradients_in_a_sum_are_pefts(tmp_path: Path) -> None:
    """Of a trained one beside a frozen one."""
    settings = CASES["loras"][1][:2]
    model = made("llama", settings)
    for name in ("n0", "n1"):
        save_adapter(model, tmp_path / name, name=name)
    theirs = PeftModel.from_pretrained(causal_model("llama"), tmp_path / "n0", adapter_name="n0")
    theirs.load_adapter(tmp_path / "n1", adapter_name="n1", is_trainable=True)
    theirs.base_model.set_adapter(["n0", "n1"])
    ours = load_adapter(causal_model("llama"), tmp_path / "n0", "n0")
    load_adapter(ours, tmp_path / "n1", "n1", is_trainable=True)
    activate(ours, ["n0", "n1"])
    ids = torch.arange(20).view(2, 10)
    for each in (theirs, ours):
        each(ids, labels=ids).loss.backward()
    assert not any(p.grad is not None for p in trainable_parameters(ours, "n0").values())
    for name, parameter in trainable_parameters(ours, "n1").items():
        path, factor = name.split(".adapters.n1.")
        theirs_own = theirs.get_parameter(f"base_model.model.{path}.{factor}.n1.weight")
        torch.testing.assert_close(parameter.grad, theirs_own.grad, atol=1e-6, rtol=1e-5)


def test_the_methods_of_peft_take_names(tmp_path: Path) -> None:
    model = made("llama", CASES["loras"][1][:2])
    attach(model, LoraConfig(r=2))
    model.save_pretrained(tmp_path)
    found = {
        str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("adapter_config.json")
    }
    assert found == {".", "n0", "n1"}
    theirs = PeftModel.from_pretrained(causal_model("llama"), tmp_path / "n0")
    model.set_adapter("n0")
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "one", selected_adapters=["n1"])
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["n1"]
    model.load_adapter(tmp_path / "n1", "again")
    model.set_adapter(["n1", "again"])
    assert model.active_adapters() == ["n1", "again"]
    expected = model.get_adapter_state_dict("n1")
    assert same_bits(model.get_adapter_state_dict("again"), expected)
    for name in ("n0", "n1", "again", "default"):
        model.delete_adapter(name)
    assert type(model) is type(causal_model("llama"))


def test_a_file_takes_the_place_of_another_adapter(tmp_path: Path) -> None:
    """Of other shapes, active or not as the old one was."""
    settings = CASES["loras"][1]
    for name in ("n0", "n2"):
        save_adapter(made("llama", settings), tmp_path / name, name=name)
    model = load_adapter(causal_model("llama"), tmp_path / "n0", "a")
    load_adapter(model, tmp_path / "n0", "b")
    assert active(model) == ["a"] and list(attached(model)) == ["a", "b"]
    load_adapter(model, tmp_path / "n2", "a")
    assert active(model) == ["a"]
    expected = made("llama", settings)
    activate(expected, "n2")
    assert torch.equal(logits(model), logits(expected))
    load_adapter(model, tmp_path / "n2", "b")
    assert active(model) == ["a"]
    activate(model, ["b"])
    assert torch.equal(logits(model), logits(expected))


def test_a_trained_adapter_keeps_its_parameters(tmp_path: Path) -> None:
    settings = CASES["loras"][1]
    save_adapter(made("llama", settings), tmp_path / "n0", name="n0")
    save_adapter(made("llama", settings), tmp_path / "n2", name="n2")
    model = attach(causal_model("llama"), LoraConfig(**settings[0]), "a")
    before = trainable_parameters(model, "a")
    load_adapter(model, tmp_path / "n0", "a")
    after = trainable_parameters(model, "a")
    assert all(before[name] is parameter for name, parameter in after.items())
    expected = values(made("llama", settings), "n0")
    assert [t.sum() for t in after.values()] == [t.sum() for t in expected.values()]
    assert "adapter_model.safetensors" in refusal(load_adapter, model, tmp_path / "n2", "a")


def spoil(key: str, value: float) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        tensors = load_file(directory / "adapter_model.safetensors")
        name = next(k for k in tensors if key in k)
        tensors[name][-1] = value
        save_file(tensors, directory / "adapter_model.safetensors")

    return change


def with_other_base(directory: Path) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.weight"
    tensors[key] = torch.ones(97, 24)
    save_file(tensors, directory / "adapter_model.safetensors")


def cut(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "not finite": (spoil("lora_B", float("nan")), "contains NaN or infinite values"),
    "cut short": (cut, "is damaged or not a safetensors file"),
    "another r": (lambda d: edit_json(d / "adapter_config.json", r=7), "but r is 7"),
    "another layer": (
        lambda d: edit_json(d / "adapter_config.json", target_modules=["q_proj"]),
        "has the unexpected base_model.model",
    ),
    "another base": (with_other_base, "was trained on another base"),
    "no file": (lambda d: (d / "adapter_model.safetensors").unlink(), "file not found"),
    "no LoRA": (lambda d: edit_json(d / "adapter_config.json", peft_type="LOHA"), "LOHA"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_failed_swap_leaves_the_old_one_as_it_was(case: str, tmp_path: Path) -> None:
    change, said = BROKEN[case]
    settings = CASES["loras"][1]
    for name in ("n0", "n1"):
        save_adapter(made("llama", settings), tmp_path / name, name=name)
    model = load_adapter(causal_model("llama"), tmp_path / "n1", "a")
    load_adapter(model, tmp_path / "n1", "b", is_trainable=True)
    activate(model, ["b", "a"])
    before, state = logits(model), {n: t.clone() for n, t in model.state_dict().items()}
    kinds = {path: type(module) for path, module in model.named_modules()}
    change(tmp_path / "n0")
    for name in ("a", "b", "c"):
        assert said in refusal(load_adapter, model, tmp_path / "n0", name) or name == "b"
        assert active(model) == ["b", "a"] and list(attached(model)) == ["a", "b"]
    assert {path: type(module) for path, module in model.named_modules()} == kinds
    assert same_bits(dict(model.state_dict()), state)
    assert torch.equal(logits(model), before)


def test_settings_of_a_named_adapter_are_its_own(tmp_path: Path) -> None:
    model = made("llama", CASES["loras"][1])
    save_adapter(model, tmp_path, name="n1")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["r"] == 2 and settings["target_modules"] == ["q_proj", "v_proj"]
    assert "all adapters of this model have names (n0, n1, n2)" in refusal(save_adapter, model, "x")
