"""What `dlora analyse` refuses: one line and status 2, and nothing is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from exported import Case, loaded, made_by_peft
from hostile import edit_json
from programs import start, status
from safetensors.torch import load_file, save_file

from dlora.analysis.command import main
from dlora.errors import UsageError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MISTAKES = {  # the words behind `--to out`; what the message says
    "none": ([], "the following arguments are required: --adapter"),
    "gone": (["--adapter", "gone"], "--adapter: directory gone does not exist"),
    "gone against": (["--adapter", "a", "--against", "gone"], "--against: directory gone does"),
    "run": (["--adapter", "run"], "did you mean run/adapter?"),
    "dora": (["--adapter", "dora"], "--adapter: dora is a DoRA (use_dora), whose update W' - W0"),
    "dora against": (["--adapter", "a", "--against", "dora"], "--against: dora is a DoRA"),
    "ia3": (["--adapter", "ia3"], "peft_type is 'IA3'; only LORA can be loaded"),
    "adalora": (["--adapter", "adalora"], "peft_type is 'ADALORA'; only LORA can be loaded"),
    "itself": (
        ["--adapter", "a", "--against", "./a"],
        "--against: ./a is the adapter of --adapter",
    ),
    "full": (["--adapter", "a", "--to", "run"], "--to: run is not empty"),
    "itself to": (["--adapter", "a", "--to", "a"], "--to: a is not empty"),
    "file": (["--adapter", "a", "--to", "file"], "--to: file is not a directory"),
    "twice": (["--adapter", "a", "--adapter", "b"], "argument --adapter: is given twice"),
    "zero": (["--adapter", "zero"], "zero: every update B·A is 0: train it first"),
    "not finite": (["--adapter", "nan"], "contains NaN or infinite values"),
    "no base": (["--adapter", "unnamed"], "unnamed does not record its base; add --base"),
    "lost base": (["--adapter", "lost"], "lost (--base overrides it): directory"),
    "wrong base": (["--adapter", "a", "--base", "./gone"], "--base: directory ./gone does not"),
    "other shapes": (["--adapter", "a", "--base", "wide"], "does not fit the base"),
    "other class": (["--adapter", "a", "--base", "gpt2"], "does not fit the base"),
    "quantized": (["--adapter", "a", "--base", "quantized"], "--base: quantized is quantized"),
    "compressed": (["--adapter", "a", "--base", "compressed"], "--base: compressed is compressed"),
    "nan base": (["--adapter", "a", "--base", "nan base"], "--base: model.layers.0.self_attn.q_"),
    "no weights": (
        ["--adapter", "a", "--base", "empty"],
        "--base: empty contains neither model.sa",
    ),
    "other embeddings": (
        ["--adapter", "embedding", "--base", "tuned"],
        "was trained on another mo",
    ),
    "two bases": (["--adapter", "a", "--against", "of tuned"], "of tuned is an adapter of "),
    "identity": (["--adapter", "r/adapter", "--base", "tuned"], "--base: tuned (identity "),
    "no names": (["--adapter", "a", "--against", "v"], "--against: v adapts no matrix that a ad"),
    "no library": (["--adapter", "x", "--library", "a"], "is no library of adapters"),
    "code": (["--adapter", "a", "--base", "x.gguf", "--trust-remote-code"], "--trust-remote-code"),
}


@pytest.fixture(scope="module")
def site(bases, saved_models, tmp_path_factory) -> Path:
    """The files that the mistakes name."""
    site = tmp_path_factory.mktemp("site")
    base = bases("llama")
    for name, targets in (("a", ["q_proj"]), ("v", ["v_proj"]), ("embedding", ["embed_tokens"])):
        made_by_peft(base, Case("llama", targets), site / name)
    made_by_peft(base, Case("llama", ["q_proj"], dora=True), site / "dora")
    for name in (
        "b",
        "run/adapter",
        "r/adapter",
        "ia3",
        "adalora",
        "zero",
        "nan",
        "unnamed",
        "lost",
    ):
        shutil.copytree(site / "a", site / name)
    shutil.copytree(site / "a", site / "of tuned")
    edit_json(site / "ia3" / CONFIG, peft_type="IA3")
    edit_json(site / "adalora" / CONFIG, peft_type="ADALORA")
    edit_json(site / "unnamed" / CONFIG, base_model_name_or_path=None)
    edit_json(site / "lost" / CONFIG, base_model_name_or_path=str(site / "lost base"))
    edit_json(site / "of tuned" / CONFIG, base_model_name_or_path=str(site / "tuned"))
    for name, value in (("zero", 0.0), ("nan", float("nan"))):
        tensors = load_file(site / name / WEIGHTS)
        for key in tensors:
            if ".lora_B." in key:
                tensors[key].fill_(value)
        save_file(tensors, site / name / WEIGHTS)
    for name, source in (("wide", "wide"), ("gpt2", "gpt2")):
        (site / name).symlink_to(saved_models(source))
    for name in ("quantized", "compressed", "empty", "nan base"):
        shutil.copytree(saved_models("llama"), site / name)
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edit_json(site / "quantized/config.json", quantization_config=quantization)
    edit_json(site / "compressed/config.json", dlora_low_rank={"model.layers.0.mlp.up_proj": 2})
    (site / "empty/model.safetensors").unlink()
    tensors = load_file(site / "nan base/model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 2] = torch.nan
    save_file(tensors, site / "nan base/model.safetensors", metadata={"format": "pt"})
    tuned = loaded(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01)
    tuned.save_pretrained(site / "tuned")
    # A run that recorded the identity of its base.
    checkpoint = site / "r/checkpoints/step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"base": "0" * 64}))
    (checkpoint / "manifest.json").write_text("{}")
    (site / "r/config.yaml").write_text("model: {}\n")
    (site / "file").write_text("x")
    return site


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, site, monkeypatch) -> None:
    words, message = MISTAKES[mistake]
    monkeypatch.chdir(site)
    target = [] if "--to" in words else ["--to", "out"]
    with pytest.raises(UsageError) as refused:
        main([*target, *words])
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (site / "out").exists()
    assert not [path for path in site.iterdir() if path.name.startswith(".")]


def test_the_command_ends_with_status_2(site, tmp_path) -> None:
    words = ["--adapter", "dora", "--to", str(tmp_path / "out")]
    log = tmp_path / "log"
    assert status(start(1, ["dlora.analysis.command", *words], log, directory=site)) == 2
    (line,) = log.read_text().splitlines()
    assert line.startswith("dlora: error: --adapter: dora is a DoRA")
