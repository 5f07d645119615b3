"""What `dlora compose` refuses: one line and status 2, through the command."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import edit_json
from mixes import save_random
from programs import start, status
from safetensors.torch import load_file, save_file
from tiny import whole

from dlora.errors import UsageError
from dlora.library.compose import main

QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MISTAKES = {  # the words behind `--to out`; what the message says
    "empty": (["--method", "cat", "--adapters"], "--adapters: expected at least one argument"),
    "no mix": (["--method", "cat"], "the following arguments are required: --adapters"),
    "zero": (["--method", "cat", "--adapters", "a=0", "b=0"], "all weights are 0"),
    "no weight": (["--method", "cat", "--adapters", "a", "b=1"], "a has no weight: write a=1.0"),
    "nan": (["--method", "cat", "--adapters", "a=nan"], "a=nan: a weight is a finite number"),
    "inf": (["--method", "cat", "--adapters", "a=-inf"], "a=-inf: a weight is a finite number"),
    "word": (["--method", "cat", "--adapters", "a=x"], "a weight is a finite number, not 'x'"),
    "twice": (["--method", "cat", "--adapters", "a=1", "./a=2"], "a and ./a are one adapter"),
    "digits": (
        ["--method", "cat", "--adapters", "a=1e999"],
        "a=1e999: a weight is a finite number",
    ),
    "no number": (["--method", "cat", "--adapters", "a="], "a weight is a finite number, not ''"),
    "large": (
        ["--method", "linear", "--adapters", "a=1e300"],
        "q_proj times 1e+300 is beyond float32",
    ),
    "large sum": (
        ["--method", "ties_svd", "--adapters", "a=2e38"],
        "q_proj: the mix is beyond float32",
    ),
    "long": (["--method", "cat", "--adapters", "a=1", "--to", "x" * 300], "File name too long"),
    "long name": (["--method", "cat", "--adapters", "x" * 5000 + "=1"], "File name too long"),
    "user": (["--method", "cat", "--adapters", "~nobody-here/a=1"], "--adapters: ~nobody-here/a"),
    "ring": (["--method", "cat", "--adapters", "a=1", "--to", "ring"], "--to: "),
    "link": (["--method", "cat", "--adapters", "linked=1"], "is a link out of its directory"),
    "gone": (["--method", "cat", "--adapters", "nix=1"], "directory nix does not exist"),
    "run": (["--method", "cat", "--adapters", "run=1"], "did you mean run/adapter?"),
    "checkpoint": (
        ["--method", "cat", "--adapters", "step=1"],
        "step is a checkpoint; `dlora export",
    ),
    "method": (["--method", "mean", "--adapters", "a=1"], "--method: invalid choice: 'mean'"),
    "rank": (["--method", "cat", "--adapters", "a=1", "--rank", "2"], "--rank cannot act with"),
    "no rank": (["--method", "svd", "--adapters", "a=1", "--rank", "0"], "at least 1, not '0'"),
    "density": (
        ["--method", "svd", "--adapters", "a=1", "--density", ".5"],
        "--density cannot act",
    ),
    "share": (
        ["--method", "ties", "--adapters", "a=1", "--density", "1.5"],
        "at most 1, not '1.5'",
    ),
    "rank twice": (
        ["--method", "svd", "--adapters", "a=1", "--rank", "2", "--rank=3"],
        "argument --rank: is given twice",
    ),
    "seed": (["--method", "ties", "--adapters", "a=1", "--seed", "1"], "--seed cannot act with"),
    "budget": (
        ["--method", "cat", "--adapters", "a=1", "--budget", "3"],
        "cannot act without --search",
    ),
    "fixed": (
        ["--method", "cat", "--adapters", "a=1", "--search", "x"],
        "--search: every adapter has a weight",
    ),
    "target": (
        ["--method", "cat", "--adapters", "a=1", "--to", "a"],
        "--to: a is the adapter itself",
    ),
    "full": (["--method", "cat", "--adapters", "a=1", "--to", "run"], "--to: run is not empty"),
    "base": (["--method", "cat", "--adapters", "a=1", "other=1"], "--base PATH says that both"),
    "shape": (
        ["--method", "cat", "--adapters", "a=1", "wide=1"],
        "q_proj is [64, 64], not [40, 40]",
    ),
    "ranks": (["--method", "linear", "--adapters", "a=1", "b=1"], "which needs equal r"),
    "dora": (["--method", "cat", "--adapters", "a=1", "dora=1"], "dora: is a DoRA (use_dora)"),
    "whole": (
        ["--method", "cat", "--adapters", "a=1", "whole=1"],
        "trains model.norm whole (modules_to_save)",
    ),
    "bias": (["--method", "cat", "--adapters", "a=1", "bias=1"], "bias: 'all' is not supported"),
    "ia3": (["--method", "cat", "--adapters", "ia3=1"], "peft_type is 'IA3'"),
    "not finite": (
        ["--method", "cat", "--adapters", "broken=1"],
        "contains NaN or infinite values",
    ),
    "half": (["--method", "cat", "--adapters", "half=1"], "it needs one A and one B"),
    "cut": (["--method", "cat", "--adapters", "cut=1"], "is damaged or not a safetensors file"),
    "task": (["--method", "cat", "--adapters", "a=1", "task=1"], "task_type is"),
    "copies": (["--method", "cat", "--adapters", "e=1", "f=1"], "they are adapters of two bases"),
    "no library": (
        ["--method", "cat", "--adapters", "x=1", "--library", "a"],
        "is no library of adapters",
    ),
}


@pytest.fixture(scope="module")
def site(saved_models, tmp_path_factory) -> Path:
    """The files that the mistakes name."""
    site = tmp_path_factory.mktemp("site")
    fresh = lambda: whole(saved_models("llama"))  # noqa: E731
    how: dict[str, dict[str, Any]] = {
        "a": {}, "b": {"r": 3}, "run/adapter": {}, "dora": {"use_dora": True},
        "whole": {"modules_to_save": ["model.norm"]}, "e": {"target_modules": ["embed_tokens"]},
    }  # fmt: skip
    for seed, (name, settings) in enumerate(how.items()):
        usual = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        save_random(fresh(), site / name, seed, **usual | settings)
    for name in ("other", "bias", "ia3", "broken", "half", "cut", "task", "wide"):
        shutil.copytree(site / "a", site / name)
    edit_json(site / "other/adapter_config.json", base_model_name_or_path="someone/else")
    edit_json(site / "bias/adapter_config.json", bias="all")
    edit_json(site / "ia3/adapter_config.json", peft_type="IA3")
    edit_json(site / "task/adapter_config.json", task_type="SEQ_2_SEQ_LM")
    shutil.copytree(site / "e", site / "f")
    copy = "base_model.model.model.embed_tokens.base_layer.weight"
    change(site / "f", lambda t: t[copy].__setitem__((2, 3), 9.0))
    change(site / "broken", lambda t: t[QUERY].__setitem__((0, 0), torch.nan))
    change(site / "half", lambda t: t.pop(QUERY))
    change(site / "wide", widen)
    file = site / "cut/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    (site / "ring").symlink_to("ring")
    shutil.copytree(site / "a", site / "linked")
    (site / "linked/adapter_model.safetensors").unlink()
    (site / "linked/adapter_model.safetensors").symlink_to(site / "a/adapter_model.safetensors")
    (site / "step").mkdir()
    (site / "step/manifest.json").write_text("{}")
    return site


def change(adapter: Path, edit: Any) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def widen(tensors: dict[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        size = (4, 64) if "lora_A" in key else (64, 4)
        tensors[key] = torch.ones(size, dtype=tensor.dtype)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, site, monkeypatch):
    words, message = MISTAKES[mistake]
    monkeypatch.chdir(site)
    target = [] if "--to" in words else ["--to", "out"]
    with pytest.raises(UsageError) as refused:
        main([*target, *words])
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (site / "out").exists()
    assert not [path for path in site.iterdir() if path.name.startswith(".")]


def test_the_command_ends_with_status_2(site, tmp_path):
    words = ["--adapters", "a=nan", "--method", "cat", "--to", str(tmp_path / "out")]
    log = tmp_path / "log"
    assert status(start(1, ["dlora.library.compose", *words], log, directory=site)) == 2
    assert log.read_text().splitlines() == [
        "dlora: error: --adapters: a=nan: a weight is a finite number, not 'nan'"
    ]


def test_adapters_may_be_given_one_by_one(site, tmp_path, monkeypatch):
    """Of an option that is given twice argparse takes the last one alone."""
    monkeypatch.chdir(site)
    words = ["--adapters", "a=1", "--adapters", "b=-1", "--method", "cat"]
    assert main([*words, "--to", str(tmp_path / "out")]) == 0
    made = json.loads((tmp_path / "out/composition.json").read_text())["adapters"]
    assert [(Path(one["path"]).name, one["weight"]) for one in made] == [("a", 1.0), ("b", -1.0)]


def test_a_base_may_be_named(site, tmp_path, monkeypatch):
    """Two names of one base, by the user's word; the result has that name."""
    monkeypatch.chdir(site)
    words = ["--adapters", "a=1", "other=1", "--method", "cat", "--base", "me/base"]
    assert main([*words, "--to", str(tmp_path / "out")]) == 0
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "me/base"


def test_one_base_in_two_places(site, saved_models, tmp_path, monkeypatch, capsys):
    """Its identity tells, and one of another base that has all shapes alike."""
    monkeypatch.chdir(site)
    for name, seed in (("copy", None), ("tuned", 1)):
        shutil.copytree(saved_models("llama"), tmp_path / name)
        shutil.copytree(site / "a", tmp_path / f"of-{name}")
        edit_json(
            tmp_path / f"of-{name}/adapter_config.json",
            base_model_name_or_path=str(tmp_path / name),
        )
        if seed is not None:
            model = whole(tmp_path / name)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01)
            model.save_pretrained(tmp_path / name)
    words = ["--method", "cat", "--to", str(tmp_path / "out")]
    assert main(["--adapters", "a=1", f"{tmp_path}/of-copy=1", *words]) == 0
    assert "(identity " in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UsageError, match=r"of-tuned is an adapter of .* \(identity "):
        main(["--adapters", "a=1", f"{tmp_path}/of-tuned=1", *words])
    assert not (tmp_path / "out").exists()
