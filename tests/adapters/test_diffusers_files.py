"""Adapters of models of diffusers are loaded by its own loaders, with the scale that they had."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from beyond_causal import KINDS, output_of
from causal_models import quiet_peft, randomize_trainable, relative_error

from dlora import LoraConfig, UsageError, attach, save_adapter
from dlora.adapters.diffusers_format import LORA_WEIGHTS
from dlora.adapters.save_load import WEIGHTS
from dlora.library.command import main as library
from dlora.library.compose import main as compose

pytestmark = [*quiet_peft, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
PREFIXES = {"unet": "unet", "dit": "transformer", "sd3": "transformer", "flux": "transformer"}


def saved(name: str, directory: Path, seed: int = 2, **settings: Any) -> torch.Tensor:
    """The output of an adapted model whose adapter is saved in `directory`."""
    kind = KINDS[name]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=kind.targets, **settings)
    model = attach(kind.model(), config)
    randomize_trainable(model, seed)
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


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_a_mix_is_loaded_as_the_weighted_adapters_are(name: str, tmp_path: Path) -> None:
    """Of different r, scales and targets, beside diffusers' own `set_adapters`."""
    settings: list[dict[str, Any]] = [{"use_rslora": True}, {"rank_pattern": {"to_q": 2}}]
    wanted, weights = KINDS[name].model(), [0.7, -0.4]
    for number, setting in enumerate(settings):
        saved(name, tmp_path / str(number), seed=number, **setting)
        wanted.load_lora_adapter(
            str(tmp_path / str(number)),
            prefix=PREFIXES[name],
            weight_name=LORA_WEIGHTS,
            adapter_name=str(number),
        )
    wanted.set_adapters(["0", "1"], weights)
    mix = [f"{tmp_path / str(number)}={weight}" for number, weight in enumerate(weights)]
    assert compose(["--adapters", *mix, "--method", "cat", "--to", str(tmp_path / "mix")]) == 0
    for file, prefix in ((LORA_WEIGHTS, PREFIXES[name]), (WEIGHTS, "base_model.model")):
        model = KINDS[name].model()
        model.load_lora_adapter(str(tmp_path / "mix"), prefix=prefix, weight_name=file)
        assert relative_error(output(name, model), output(name, wanted)) < 1e-5, file


def test_a_library_has_the_file(tmp_path: Path) -> None:
    saved("unet", tmp_path / "adapter")
    library(["add", str(tmp_path / "library"), str(tmp_path / "adapter"), "--name", "style"])
    one, other = (
        d / LORA_WEIGHTS for d in (tmp_path / "adapter", tmp_path / "library/active/style")
    )
    assert one.read_bytes() == other.read_bytes()


def test_adapters_of_two_models_of_a_pipeline(tmp_path: Path) -> None:
    for name in ("unet", "dit"):
        saved(name, tmp_path / name)
    words = ["--adapters", f"{tmp_path}/unet=1", f"{tmp_path}/dit=1", "--to", f"{tmp_path}/mix"]
    with pytest.raises(UsageError, match="do not belong together|another base"):
        compose([*words, "--method", "cat"])
    assert not (tmp_path / "mix").exists()


def test_what_diffusers_cannot_load_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="diffusers loads no modules_to_save"):
        saved("unet", tmp_path, modules_to_save=["conv_out"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", WEIGHTS]
