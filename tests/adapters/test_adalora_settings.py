"""What is wrong with AdaLoRA's settings is said in one line that names the key, before a weight is
read.
"""

from pathlib import Path
from typing import Any

import pytest
from tiny import command, whole

from dlora import LoraConfig, attach, save_adapter
from dlora.runtime.exit_status import exit_with
from dlora.train import main

pytestmark = pytest.mark.usefixtures("no_weights_are_read")
ADALORA = {"adapter__method": "adalora", "adapter__r": None, "train__max_steps": 10}


@pytest.fixture
def said(saved_models: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    """said(**settings): the line on standard error of a command that ends with status 2."""

    def of(**settings: Any) -> str:
        argv = command(saved_models("llama"), tmp_path, **ADALORA | settings)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            exit_with(lambda _: main(argv))
        assert ended.value.code == 2
        line = capfd.readouterr().err.strip()
        assert "\n" not in line
        return line

    return of


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
def test_a_setting_that_cannot_be(said: Any, settings: dict[str, Any], key: str, also: str) -> None:
    line = said(**{f"adapter__{name}": value for name, value in settings.items()})
    assert key in line and also in line


def test_an_adapter_to_start_from(saved_models: Any, tmp_path: Path, said: Any) -> None:
    save_adapter(attach(whole(saved_models("llama")), LoraConfig(r=4)), tmp_path / "start")
    assert "adapter.path" in said(adapter__path=str(tmp_path / "start"))


def test_the_phases_must_fit_epochs_too(said: Any) -> None:
    """promise 2.5: the schedule spans the steps of the run, however they are given."""
    epochs = {"train__max_steps": None, "train__epochs": 2}  # of 8 sequences, 4 in a step
    line = said(**epochs, adapter__tinit=2, adapter__tfinal=2)
    assert "adapter.tinit" in line and "no step to prune in, of the run's 4" in line
