"""PEFT's files with the names that a model had in an older version of transformers."""

from pathlib import Path

import peft
import pytest
from beyond_causal import KINDS, output_of
from causal_models import quiet_peft, randomize_trainable, relative_error
from hostile import edit_json
from safetensors.torch import load_file, save_file

from dlora import load_adapter
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
