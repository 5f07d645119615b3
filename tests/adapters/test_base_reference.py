"""The base that an adapter records is found from another directory, by PEFT too."""

import json
import shutil
from pathlib import Path

import peft
import pytest
from causal_models import causal_model, logits, quiet_peft, randomize_trainable, relative_error
from gguf_files import tiny_llama
from transformers import AutoModelForCausalLM

from dlora import LoraConfig, attach, save_adapter
from dlora.adapters.open_adapter import open_adapter
from dlora.adapters.save_load import CONFIG
from dlora.base.model import find_base
from dlora.export.command import main

pytestmark = quiet_peft
QUERIES = LoraConfig(r=2, target_modules=["q_proj"])


def recorded(directory: Path) -> str:
    return json.loads((directory / CONFIG).read_text())["base_model_name_or_path"]


@pytest.mark.parametrize("named", ["by the model", "by the caller"])
def test_a_relative_path_is_recorded_as_an_absolute_one(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    causal_model("llama").save_pretrained("base")
    model = attach(AutoModelForCausalLM.from_pretrained("base"), QUERIES)
    randomize_trainable(model)
    given = {} if named == "by the model" else {"base_model_name_or_path": "./base"}
    save_adapter(model, "adapter", **given)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert relative_error(logits(theirs), logits(model)) < 1e-5
    assert main(["--adapter", str(tmp_path / "adapter"), "--to", "out"]) == 0
    assert recorded(Path("out")) == str(tmp_path / "base")


def test_a_hub_id_is_recorded_as_it_is(tmp_path: Path) -> None:
    model = attach(causal_model("llama"), QUERIES)
    save_adapter(model, tmp_path, base_model_name_or_path="owner/tiny")
    assert recorded(tmp_path) == "owner/tiny"


def test_of_a_gguf_the_converted_directory_is_recorded_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = tiny_llama(tmp_path / "tiny.gguf")
    run = {"model": {"path": str(gguf), "cache_dir": str(tmp_path / "cache")}}
    (tmp_path / "config.yaml").write_text(json.dumps(run))
    converted = find_base(str(gguf), cache_dir=str(tmp_path / "cache")).source
    model = attach(AutoModelForCausalLM.from_pretrained(converted), QUERIES)
    randomize_trainable(model)
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(gguf))
    words = ["--adapter", str(tmp_path / "adapter"), "--to", str(tmp_path / "out")]
    assert main(words) == 0
    assert recorded(tmp_path / "out") == converted
    assert f"the adapter names the converted base {converted}" in capsys.readouterr().out
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").float()
    assert relative_error(logits(theirs), logits(model.float())) < 1e-2
    # In the run's directory the .gguf is known, so that it can be converted once more.
    shutil.copytree(tmp_path / "out", tmp_path / "kept")
    assert open_adapter(tmp_path / "kept").base.path == converted
    shutil.rmtree(converted)
    assert open_adapter(tmp_path / "kept").base.path == str(gguf)
