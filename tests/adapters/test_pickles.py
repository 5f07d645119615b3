"""A pickle, wherever dlora reads a file, is refused in one line or ignored, and never unpickled."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import loaded, write_checkpoint
from hostile import CONFIG, WEIGHTS, agree, edit_json, readings
from refusals import preparation, refusal
from safetensors.torch import load_file
from tiny import command

from dlora import load_adapter
from dlora.adapters.open_adapter import open_adapter
from dlora.base.model import BaseWeights, find_base
from dlora.checkpoint import format as checkpoint


class Bomb:
    """Unpickled, it makes a directory."""

    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.crater),)


@pytest.fixture(params=["plain", "torch"])
def planted(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """planted(path): puts a pickle there, which must not have gone off when the test is over."""
    crater, made = tmp_path / "crater", tmp_path / "bomb"
    if request.param == "torch":
        torch.save({"weight": Bomb(crater)}, made)
        torch.load(made, weights_only=False)
    else:
        made.write_bytes(pickle.dumps(Bomb(crater)))
        pickle.loads(made.read_bytes())
    crater.rmdir()  # it works
    yield lambda path: shutil.copyfile(made, path)
    assert not crater.exists()


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors.index.json", "shard"]
)
def test_a_pickle_as_a_file_of_the_base(name: str, base: Path, tmp_path: Path, planted: Any):
    path = sorted(base.glob("model-*.safetensors"))[1] if name == "shard" else base / name
    planted(path)
    assert refusal(preparation, command(base, tmp_path)).startswith("model.path: ")
    found = find_base(str(base))
    reads_it = name == "tokenizer.json"
    refusal(found.tokenizer if reads_it else lambda: BaseWeights(found).from_pretrained())


def test_pickles_beside_or_instead_of_weights(base: Path, tmp_path: Path, planted: Any):
    """What other libraries would read: beside safetensors it is ignored, alone it is refused."""
    beside = ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt", "x.pkl")
    for name in beside:
        planted(base / name)
    preparation(command(base, tmp_path))
    model = BaseWeights(find_base(str(base), dtype="float32")).from_pretrained()
    stored = {k: v for file in base.glob("*.safetensors") for k, v in load_file(file).items()}
    assert all(torch.equal(tensor, stored[n]) for n, tensor in model.named_parameters())
    index = base / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=names | {next(iter(names)): "pytorch_model.bin"})
    for work in (
        lambda: preparation(command(base, tmp_path)),
        lambda: BaseWeights(find_base(str(base))).from_pretrained(),
    ):
        assert "'pytorch_model.bin' is not a safetensors file" in refusal(work)
    index.unlink()
    said = refusal(lambda: BaseWeights(find_base(str(base))).from_pretrained())
    assert "contains neither model.safetensors" in said


def test_pickles_as_an_adapter(adapter: Path, base: Path, tmp_path: Path, planted: Any):
    planted(adapter / "adapter_model.bin")
    assert load_adapter(loaded(base), adapter).dlora.adapted  # it is ignored
    whole = Path(shutil.copytree(adapter, tmp_path / "whole"))
    for name in (WEIGHTS, CONFIG):
        for damage in (planted, Path.unlink):
            shutil.copytree(whole, adapter, dirs_exist_ok=True)
            damage(adapter / name)
            for work in readings(adapter, base):
                assert name in refusal(work)


def test_pickles_in_a_checkpoint(base: Path, tmp_path: Path, planted: Any):
    """One whose hashes agree is refused too; beside its files a pickle is ignored."""
    directory, _ = write_checkpoint(base, tmp_path / "run")
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.bin"):
        planted(directory / name)
    before = checkpoint.read(directory)
    whole = Path(shutil.copytree(directory, tmp_path / "whole"))
    for name in ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
        for lie in (lambda _: None, agree):
            shutil.copytree(whole, directory, dirs_exist_ok=True)
            planted(directory / name)
            if name != "manifest.json":
                lie(directory)
            assert name in refusal(checkpoint.read, directory)
    shutil.copytree(whole, directory, dirs_exist_ok=True)
    planted(directory / "config.yaml")
    agree(directory)
    assert "config.yaml" in refusal(open_adapter, directory)
    assert checkpoint.read(whole).tensors.keys() == before.tensors.keys()


def test_pickles_as_data_settings_or_gguf(base: Path, tmp_path: Path, planted: Any):
    for name in ("data.jsonl", "settings.yaml", "model.gguf"):
        planted(tmp_path / name)
    data = command(base, tmp_path, data__train=str(tmp_path / "data.jsonl"))
    assert refusal(preparation, data).startswith("data.train: ")
    settings = ["--config", str(tmp_path / "settings.yaml")]
    assert "settings.yaml" in refusal(preparation, settings)
    gguf = command(tmp_path / "model.gguf", tmp_path, model__cache_dir=str(tmp_path / "cache"))
    assert "is not a GGUF file" in refusal(preparation, gguf)


def test_code_that_comes_with_a_base_is_not_run(base: Path, tmp_path: Path):
    crater = tmp_path / "crater"
    (base / "code.py").write_text(f"import os\nos.mkdir({str(crater)!r})\n")
    classes = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    edit_json(base / "config.json", auto_map=classes)
    edit_json(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", "code.T"]})
    preparation(command(base, tmp_path))  # transformers knows this kind of model itself
    BaseWeights(find_base(str(base))).from_pretrained()
    edit_json(base / "config.json", auto_map=classes, model_type="unheard-of")
    assert refusal(preparation, command(base, tmp_path)).startswith("model.path: ")
    assert not crater.exists()
