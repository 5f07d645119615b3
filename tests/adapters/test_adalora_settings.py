"""What is wrong with AdaLoRA's settings is said in one line that names the key, before a weight is
read.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import command
from transformers import AutoModelForCausalLM

from dlora import LoraConfig, attach, save_adapter
from dlora.base.model import BaseModel
from dlora.runtime.exit_status import exit_with
from dlora.train import main

ADALORA = {"adapter__method": "adalora", "adapter__r": None, "train__max_steps": 10}


def refusal(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The line on standard error of a command that ends with status 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda _: main(argv))
    assert ended.value.code == 2
    said = capfd.readouterr().err.strip()
    assert "\n" not in said
    return said


@pytest.fixture(autouse=True)
def no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(BaseModel, "load", read)


@pytest.mark.parametrize(
    ("settings", "key", "also"),
    [
        ({"tinit": 6, "tfinal": 4}, "adapter.tinit", "no step to prune in, of the run's 10"),
        ({"deltaT": 0}, "adapter.deltaT", ">= 1"),
        ({"init_r": 4, "target_r": 5}, "adapter.target_r", "init_r 4"),
        ({"r": 4}, "adapter.r", "adapter.init_r"),
        ({"rank_pattern": {"q_proj": 2}}, "adapter.rank_pattern", "adalora"),
        ({"init_lora_weights": "orthogonal"}, "adapter.init_lora_weights", ""),
        ({"beta1": 0.9, "importance": "magnitude"}, "adapter.beta1", "uncertainty"),
        ({"method": "lora", "target_r": 4}, "adapter.target_r", "not adalora"),
    ],
)
def test_a_setting_that_cannot_be(
    saved_models: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    key: str,
    also: str,
) -> None:
    given = ADALORA | {f"adapter__{name}": value for name, value in settings.items()}
    said = refusal(command(saved_models("llama"), tmp_path, **given), capfd)
    assert key in said and also in said


def test_an_adapter_to_start_from(
    saved_models: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved_models("llama"), dtype=torch.float32)
    save_adapter(attach(model, LoraConfig(r=4)), tmp_path / "start")
    start = {"adapter__path": str(tmp_path / "start")}
    said = refusal(command(saved_models("llama"), tmp_path, **ADALORA, **start), capfd)
    assert "adapter.path" in said


def test_the_phases_must_fit_epochs_too(
    saved_models: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """promise 2.5: the schedule spans the steps of the run, however they are given."""
    epochs = {"train__max_steps": None, "train__epochs": 2}  # of 8 sequences, 4 in a step
    given = ADALORA | epochs | {"adapter__tinit": 2, "adapter__tfinal": 2}
    said = refusal(command(saved_models("llama"), tmp_path, **given), capfd)
    assert "adapter.tinit" in said and "no step to prune in, of the run's 4" in said
