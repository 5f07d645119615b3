"""What PEFT's loader tolerates or reads in its files is honoured, and the logits are PEFT's."""

from pathlib import Path
from typing import Any

import peft
import pytest
from causal_models import causal_model, logits, quiet_peft, randomize_trainable, relative_error
from hostile import edit_json
from refusals import refusal
from test_adapter_files import adapted_by_peft, adapted_here, load_in_peft, peft_model

from dlora import LoraConfig, attach, load_adapter, save_adapter
from dlora.adapters.open_adapter import open_adapter
from dlora.adapters.save_load import CONFIG

pytestmark = [*quiet_peft, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

# Of the saved adapter: targets, and the changes of its configuration.
FOREIGN: dict[str, tuple[list[str], dict[str, Any]]] = {
    "a target that the model lacks": (["q_proj"], {"target_modules": ["q_proj", "c_attn"]}),
    "a path that the model lacks": (["v_proj"], {"target_modules": ["v_proj", "layers.9.k_proj"]}),
    "a rank of no module": (["q_proj"], {"rank_pattern": {"c_attn": 9, "layers.7.q_proj": 2}}),
    "a scale of no module": (["q_proj"], {"alpha_pattern": {r"h\.\d+\.mlp": 99}}),
    "modules to save of another model": (["q_proj"], {"modules_to_save": ["wte", "score"]}),
    "an exclusion of nothing": (["o_proj"], {"exclude_modules": ["vision_tower"]}),
    "a layer that the model lacks": (
        ["q_proj"],
        {"layers_to_transform": [0, 1, 31], "layers_pattern": "layers"},
    ),
    "everything at once": (
        ["q_proj", "down_proj"],
        {
            "target_modules": ["down_proj", "dense", "q_proj"],
            "rank_pattern": {"dense": 3},
            "modules_to_save": ["classifier"],
            "exclude_modules": "lm_head",
            "fan_in_fan_out": True,
            "auto_mapping": {"base_model_class": "X", "parent_library": "y"},
            "eva_config": {},
        },
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_names_that_the_model_lacks_are_ignored_as_in_peft(case: str, tmp_path: Path) -> None:
    targets, changes = FOREIGN[case]
    theirs = peft_model("llama", {"target_modules": targets, "r": 4, "lora_alpha": 6})
    theirs.save_pretrained(tmp_path)
    edit_json(tmp_path / CONFIG, **changes)
    expected = logits(load_in_peft("llama", tmp_path))
    assert relative_error(logits(theirs), expected) < 1e-6
    ours = load_adapter(causal_model("llama").eval(), tmp_path)
    assert relative_error(logits(ours), expected) < 1e-5
    source, skeleton = open_adapter(tmp_path), causal_model("llama").eval()
    source.attach_to(skeleton)
    source.load_into(skeleton)
    assert relative_error(logits(skeleton), expected) < 1e-5
    save_adapter(ours, tmp_path / "again")
    assert relative_error(logits(load_in_peft("llama", tmp_path / "again")), expected) < 1e-5


# Which modules PEFT's settings mean, beside `target_modules`.
CHOICES: dict[str, dict[str, Any]] = {
    "excluded names": {
        "target_modules": "all-linear",
        "exclude_modules": ["mlp.up_proj", "v_proj"],
    },
    "excluded path": {
        "target_modules": ["q_proj"],
        "exclude_modules": ["model.layers.0.self_attn.q_proj"],
    },
    "excluded expression": {"target_modules": r".*_proj", "exclude_modules": r".*\.1\.mlp\..*"},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "a whole path": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]},
    "layers of a list": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "layers"],
    },
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_modules_are_those_that_peft_chooses(case: str, tmp_path: Path) -> None:
    settings = {"r": 4, "lora_alpha": 6} | CHOICES[case]
    theirs = peft_model("llama", settings)
    ours = attach(causal_model("llama").eval(), LoraConfig(**settings))
    assert adapted_here(ours).keys() == adapted_by_peft(theirs).keys()
    assert 0 < len(adapted_here(ours)) < 14
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(causal_model("llama").eval(), tmp_path / "theirs")
    assert relative_error(logits(loaded), logits(theirs)) < 1e-5
    randomize_trainable(ours)
    save_adapter(ours, tmp_path / "ours")
    assert relative_error(logits(load_in_peft("llama", tmp_path / "ours")), logits(ours)) < 1e-5


UNABLE: list[tuple[str, dict[str, Any]]] = [
    ("exclude_modules: 'c_attn' matches none of the 4 targ", {"exclude_modules": ["c_attn"]}),
    ("layers_to_transform: no target module is in block 2", {"layers_to_transform": [0, 2]}),
    ("layers_to_transform: must be >= 0", {"layers_to_transform": -1}),
    (
        "layers_to_transform: needs a target_modules that is a list",
        {"target_modules": "all-linear", "layers_to_transform": 0},
    ),
    ("layers_pattern: cannot act without layers_to_transform", {"layers_pattern": "layers"}),
    ("exclude_modules: '(' is not a regular expression", {"exclude_modules": "("}),
    ("matches no module that is not excluded", {"exclude_modules": ".*"}),
    ("task_type: expected one of CAUSAL_LM", {"task_type": "SEQ_CLASSIFICATION"}),
]


@pytest.mark.parametrize(("message", "choice"), UNABLE)
def test_a_choice_that_cannot_act_is_an_error_where_the_user_made_it(
    message: str, choice: dict[str, Any]
) -> None:
    settings = {"target_modules": ["q_proj", "v_proj"]} | choice
    said = refusal(lambda: attach(causal_model("llama"), LoraConfig(**settings)))
    assert message in said


@pytest.mark.parametrize("name", ["lm_head", "layers.1.mlp"])
def test_modules_to_save_alone_go_both_ways(name: str, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=[], modules_to_save=[name])
    ours = attach(causal_model("llama").eval(), config)
    randomize_trainable(ours)
    save_adapter(ours, tmp_path)
    theirs = load_in_peft("llama", tmp_path)
    assert relative_error(logits(ours), logits(causal_model("llama").eval())) > 1e-2
    assert relative_error(logits(theirs), logits(ours)) < 1e-6
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(causal_model("llama").eval(), tmp_path / "theirs")
    assert again.dlora.adapted == [] and again.dlora.saved == ours.dlora.saved
    assert relative_error(logits(again), logits(ours)) < 1e-6


def test_pefts_own_modules_to_save_alone_are_loaded(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules="dummy-target-modules", modules_to_save=["lm_head"])
    theirs = peft.get_peft_model(causal_model("llama"), config).eval()
    randomize_trainable(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(causal_model("llama").eval(), tmp_path)
    assert relative_error(logits(ours), logits(theirs)) < 1e-6
