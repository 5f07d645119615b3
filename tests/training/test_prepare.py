"""What is wrong with a run is said in one line by its preparation, before a weight is read."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import refusals
from hostile import CONFIG, edit_json
from tiny import VOCABULARY, command, tokenizer, whole

from dlora import LoraConfig, attach, save_adapter
from dlora.errors import UsageError

pytestmark = pytest.mark.usefixtures("no_weights_are_read")
preparation = functools.partial(refusals.preparation, check=True)


def saved(path: str, directory: Path, **config: Any) -> Path:
    """A fresh adapter of a model, on disk."""
    save_adapter(attach(whole(path), LoraConfig(**{"r": 4} | config)), directory)
    return directory


# -- where the run writes --------------------------------------------------------------------------


def test_a_file_is_no_output_directory(saved_models: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for wanted in ("file", "file/run"):
        argv = command(saved_models("llama"), tmp_path, output__dir=str(tmp_path / wanted))
        with pytest.raises(UsageError, match="^output.dir: .*/file is a file"):
            preparation(argv)


def test_an_output_directory_without_permission(
    saved_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # permissions do not bind root
    with pytest.raises(UsageError, match="^output.dir: .* cannot be written to"):
        preparation(command(saved_models("llama"), tmp_path))


def test_home_is_expanded(
    saved_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(saved_models("llama"), tmp_path / "start")
    (tmp_path / "file").write_text("")
    argv = command(saved_models("llama"), tmp_path, adapter__r=None, adapter__path="~/start")
    assert preparation([*argv, "--data.eval", "~/chats.jsonl"]).lora.r == 4
    argv[argv.index("--output.dir") + 1] = "~/file"
    with pytest.raises(UsageError, match="^output.dir: .*/file is a file"):
        preparation(argv)


# -- what the model has room for -------------------------------------------------------------------


def texts(tmp_path: Path, *lines: str) -> dict[str, Any]:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return {"data__train": str(path), "data__format": "text"}


@pytest.mark.parametrize(("model", "refused"), [("gpt2", True), ("llama", False)])
def test_more_tokens_than_learned_positions(
    saved_models: Any, tmp_path: Path, model: str, refused: bool
) -> None:
    argv = command(saved_models(model), tmp_path, **texts(tmp_path, "a" * 300, "b"))
    if refused:
        message = "^data.max_length: data.train contains a sequence of 301 tokens, .* 256 positions"
        with pytest.raises(UsageError, match=message):
            preparation(argv)
        argv += ["--data.max_length", "256"]
    assert preparation(argv).train.report.longest == (256 if refused else 301)


def test_a_token_without_an_embedding(saved_models: Any, tmp_path: Path) -> None:
    base = Path(shutil.copytree(saved_models("llama"), tmp_path / "base"))
    larger = tokenizer()
    larger.add_tokens(["wowzer"])
    larger.add_special_tokens({"pad_token": "[PAD]"})
    larger.save_pretrained(base)
    argv = command(base, tmp_path, **texts(tmp_path, "a wowzer b"))
    with pytest.raises(
        UsageError, match=rf"^data.train: .*{VOCABULARY} \('wowzer'\).*{VOCABULARY}"
    ):
        preparation(argv)
    # A padding token beyond the embedding does no harm: another one pads.
    found = preparation(command(base, tmp_path))
    assert found.tokenizer.pad_token_id >= VOCABULARY > found.pad_id


# -- options that cannot act -----------------------------------------------------------------------


def test_more_ranks_per_node_than_ranks(saved_models: Any, tmp_path: Path) -> None:
    argv = command(saved_models("llama"), tmp_path, sharding__ranks_per_node=2)
    with pytest.raises(UsageError, match="^sharding.ranks_per_node: 2 is more than the 1 rank"):
        preparation(argv)


@pytest.mark.parametrize(("targets", "refused"), [("embed_tokens", True), ("q_proj", False)])
def test_dropout_on_a_look_up(
    saved_models: Any, tmp_path: Path, targets: str, refused: bool
) -> None:
    targets = json.dumps([targets, "embed_tokens"])
    argv = command(saved_models("llama"), tmp_path, adapter__target_modules=targets)
    argv += ["--adapter.lora_dropout", "0.1"]
    if refused:
        with pytest.raises(UsageError, match="^adapter.lora_dropout: 0.1 cannot act"):
            preparation(argv)
    else:
        assert preparation(argv).lora.lora_dropout == 0.1


# -- the adapter to start from ---------------------------------------------------------------------


def truncate(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.*file not found"),
        (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.*file not found"),
        (truncate, "adapter_model.safetensors: is damaged"),
        (lambda d: edit_json(d / CONFIG, r=8), r"has shape \[4, 40\], the model expects \[8, 40\]"),
        (lambda d: edit_json(d / CONFIG, target_modules=["q_proj"]), "has the unexpected"),
    ],
)
def test_a_damaged_adapter_to_start_from(
    saved_models: Any, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(saved(saved_models("llama"), tmp_path / "start"))
    argv = command(
        saved_models("llama"), tmp_path, adapter__r=None, adapter__path=str(tmp_path / "start")
    )
    with pytest.raises(UsageError, match=message):
        preparation(argv)


# -- the checkpoint to go on from ------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["nowhere", "null"])
def test_a_checkpoint_that_is_not_there(saved_models: Any, tmp_path: Path, wanted: str) -> None:
    argv = command(saved_models("llama"), tmp_path, output__resume=wanted)
    with pytest.raises(UsageError, match=f"^output.resume: checkpoint {wanted} does not exist"):
        preparation(argv)


# -- what is said ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("multiplies", [False, True])
def test_a_cpu_without_bfloat16_is_told_of(
    saved_models: Any, tmp_path: Path, monkeypatch: Any, capsys: Any, dtype: str, multiplies: bool
) -> None:
    """A step of the demo took 140 s on one, where float32 took 10."""
    monkeypatch.setattr("dlora.training.material.has_kernels", lambda: multiplies)
    preparation(command(saved_models("llama"), tmp_path, model__dtype=dtype))
    told = "model.dtype: this CPU has no instructions for bfloat16" in capsys.readouterr().out
    assert told is (dtype == "bfloat16" and not multiplies)
