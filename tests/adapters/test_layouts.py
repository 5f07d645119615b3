"""PEFT's files with the names that a model had in an older version of transformers."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from beyond_causal import KINDS, output_of
from causal_models import quiet_peft, randomize, randomize_trainable, relative_error
from hostile import edit_json
from refusals import refusal
from safetensors.torch import load_file, save_file

from dlora import load_adapter, save_adapter
from dlora.adapters.save_load import CONFIG, WEIGHTS

pytestmark = quiet_peft

# The names today, and those before transformers 4.52.
BEFORE = {
    "llava": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "lm_head.": "language_model.lm_head.",
    },
    "qwen2-vl": {"model.language_model.": "model.", "model.visual.": "visual."},
}


def before(kind: str, name: str) -> str:
    for today, once in BEFORE[kind].items():
        if name.startswith(today):
            return once + name.removeprefix(today)
    return name


def in_the_old_layout(kind: str, directory: Path) -> None:
    """Rename the tensors of an adapter."""
    prefix = "base_model.model."
    tensors = load_file(directory / WEIGHTS)
    renamed = {prefix + before(kind, k.removeprefix(prefix)): t for k, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, directory / WEIGHTS)


@pytest.mark.parametrize("named_by", ["names", "paths"])
@pytest.mark.parametrize("name", BEFORE)
def test_an_adapter_of_an_older_layout_acts_as_it_did(
    name: str, named_by: str, tmp_path: Path
) -> None:
    kind = KINDS[name]
    batch, settings = kind.batch(), {"r": 2, "modules_to_save": ["lm_head"]}
    theirs = peft.get_peft_model(
        kind.model(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], **settings)
    ).eval()
    randomize_trainable(theirs)
    expected = output_of(theirs, batch)
    theirs.save_pretrained(tmp_path)
    in_the_old_layout(name, tmp_path)
    if named_by == "paths":
        inner = theirs.base_model.model
        paths = [p for p, _ in inner.named_modules() if p.endswith(("q_proj", "v_proj"))]
        edit_json(tmp_path / CONFIG, target_modules=[before(name, path) for path in paths])
    ours = load_adapter(kind.model(), tmp_path)
    assert relative_error(output_of(ours, batch), expected) < 1e-5


def test_peft_s_own_conversion_reads_the_same(tmp_path: Path) -> None:
    kind = KINDS["llava"]  # of others, PEFT 0.21 takes the old name for today's
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(kind.model(), config)
    randomize_trainable(theirs)
    theirs.save_pretrained(tmp_path)
    in_the_old_layout("llava", tmp_path)
    again = peft.PeftModel.from_pretrained(kind.model(), tmp_path)
    ours, batch = load_adapter(kind.model(), tmp_path), kind.batch()
    assert relative_error(output_of(ours, batch), output_of(again, batch)) < 1e-5


# The class today, the old name of its layers, and of an expert's projections.
MIXTURES = {
    "Mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "Qwen2Moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def mixture(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model)
    return model.eval()


def of_single_experts(name: str, directory: Path, **changes: Any) -> tuple[Any, Any]:
    """The files of an adapter of `q_proj` and of each expert, and the model with it added to W0."""
    layer, (gate, up, down) = MIXTURES[name]
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]} | changes
    expected = mixture(name)
    theirs = peft.get_peft_model(expected, peft.LoraConfig(**settings)).eval()
    randomize_trainable(theirs)
    theirs.save_pretrained(directory)
    tensors = load_file(directory / WEIGHTS)
    scale = 6 / (2**0.5 if settings.get("use_rslora") else 2)
    generator = torch.Generator().manual_seed(5)
    for number, block in enumerate(expected.model.layers):
        experts = block.mlp.experts
        middle = experts.down_proj.shape[2]
        for e in range(3):
            both = experts.gate_up_proj.data[e]
            stored = {gate: both[:middle], up: both[middle:], down: experts.down_proj.data[e]}
            for projection, weight in stored.items():
                B, A = (
                    torch.randn(size, generator=generator) * 0.3
                    for size in ((weight.shape[0], 2), (2, weight.shape[1]))
                )
                weight += scale * B @ A
                key = f"base_model.model.model.layers.{number}.{layer}.experts.{e}.{projection}"
                tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
    save_file(tensors, directory / WEIGHTS)
    edit_json(directory / CONFIG, target_modules=["q_proj", gate, up, down])
    return expected, theirs


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("name", MIXTURES)
def test_adapters_of_single_experts_act_in_their_stack(
    name: str, rslora: bool, tmp_path: Path
) -> None:
    _, theirs = of_single_experts(name, tmp_path, use_rslora=rslora)
    if name == "Qwen2Moe":  # of its shared expert the projections have the same names
        edit_json(tmp_path / CONFIG, exclude_modules=r".*shared_expert\..*")
    ids = torch.arange(18).view(2, 9)
    with torch.no_grad():
        expected, plain = theirs(ids).logits, mixture(name)(ids).logits
        ours = load_adapter(mixture(name), tmp_path)
        assert relative_error(plain, expected) > 1e-2
        assert relative_error(ours(ids).logits, expected) < 1e-5
        save_adapter(ours, tmp_path / "again")
        again = peft.PeftModel.from_pretrained(mixture(name), tmp_path / "again")
        assert relative_error(again(ids).logits, expected) < 1e-5


@pytest.mark.parametrize("router", [False, True], ids=["experts", "experts and router"])
def test_pefts_conversion_of_single_experts_is_the_same(router: bool, tmp_path: Path) -> None:
    of_single_experts("Mixtral", tmp_path)
    if router:
        tensors = load_file(tmp_path / WEIGHTS)
        for number in range(2):
            key = f"base_model.model.model.layers.{number}.block_sparse_moe.gate"
            tensors[f"{key}.lora_A.weight"] = torch.randn(2, 16)
            tensors[f"{key}.lora_B.weight"] = torch.randn(3, 2)
        save_file(tensors, tmp_path / WEIGHTS)
        edit_json(tmp_path / CONFIG, target_modules=["q_proj", "gate", "w1", "w2", "w3"])
    theirs = peft.PeftModel.from_pretrained(mixture("Mixtral"), tmp_path).eval()
    ours, ids = load_adapter(mixture("Mixtral"), tmp_path), torch.arange(18).view(2, 9)
    assert any("gate.weight" in path for path in ours.dlora.adapted) is router
    assert relative_error(ours(ids).logits, theirs(ids).logits) < 1e-5


def test_a_stack_without_one_of_its_experts_is_refused(tmp_path: Path) -> None:
    of_single_experts("Mixtral", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    lost = [key for key in tensors if ".experts.1.w3." in key]
    save_file({k: t for k, t in tensors.items() if k not in lost}, tmp_path / WEIGHTS)
    said = refusal(load_adapter, mixture("Mixtral"), tmp_path)
    assert "gate_up_proj is one weight today" in said and "(expert 1)" in said
