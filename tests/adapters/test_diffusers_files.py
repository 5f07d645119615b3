"""Adapters of models of diffusers are loaded by its own loaders, with the scale that they had."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from beyond_causal import KINDS, output_of
from causal_models import quiet_peft, randomize_trainable, relative_error

from dlora import LoraConfig, attach, save_adapter
from dlora.adapters.diffusers_format import LORA_WEIGHTS
from dlora.adapters.save_load import WEIGHTS

pytestmark = [*quiet_peft, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
PREFIXES = {"unet": "unet", "dit": "transformer", "sd3": "transformer", "flux": "transformer"}


def saved(name: str, directory: Path, **settings: Any) -> torch.Tensor:
    """The output of an adapted model whose adapter is saved in `directory`."""
    kind = KINDS[name]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=kind.targets, **settings)
    model = attach(kind.model(), config)
    randomize_trainable(model)
    save_adapter(model, directory)
    with torch.no_grad():
        return output_of(model, kind.batch())


def output(name: str, model: Any) -> torch.Tensor:
    with torch.no_grad():
        return output_of(model.eval(), KINDS[name].batch())


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_q": 11}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", [name for name in PREFIXES if name != "dit"])
def test_load_lora_adapter_takes_either_file(name: str, settings: str, tmp_path: Path) -> None:
    expected = saved(name, tmp_path, **SETTINGS[settings])
    assert relative_error(output(name, KINDS[name].model()), expected) > 1e-3
    for file, prefix in ((LORA_WEIGHTS, PREFIXES[name]), (WEIGHTS, "base_model.model")):
        model = KINDS[name].model()
        model.load_lora_adapter(str(tmp_path), prefix=prefix, weight_name=file)
        assert relative_error(output(name, model), expected) < 1e-5, file


def test_a_pipeline_loads_the_directory(tmp_path: Path) -> None:
    expected = saved("unet", tmp_path)
    parts = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    )
    scheduler = diffusers.DDIMScheduler()
    pipeline = diffusers.StableDiffusionPipeline(
        unet=KINDS["unet"].model(), scheduler=scheduler, requires_safety_checker=False, **parts
    )
    pipeline.load_lora_weights(str(tmp_path))
    assert relative_error(output("unet", pipeline.unet), expected) < 1e-5


def test_what_diffusers_cannot_load_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="diffusers loads no modules_to_save"):
        saved("unet", tmp_path, modules_to_save=["conv_out"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", WEIGHTS]
