"""Runs, answers and merges on a compressed base, whose weights are products."""

import copy
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from causal_models import randomize_trainable
from exported import loaded, logits
from hostile import edit_json
from refusals import preparation, refusal
from run_training import Runs, check_near
from test_compress import compressed, low_rank_base
from tiny import command as options

from dlora import LoraConfig, attach, generate, merge, save_adapter, unmerge
from dlora.export.command import main as export
from dlora.library.compressed import load_compressed
from dlora.library.extract import main as extract


@pytest.fixture(scope="module")
def made(bases, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """(factors, whole weights) of the same low-rank models."""
    root = tmp_path_factory.mktemp("made")
    pairs = {}
    for name in ("llama", "gpt2"):
        base = low_rank_base(bases, name, root / name)
        pairs[name] = (
            compressed(base, root / f"{name}-low"),
            compressed(base, root / f"{name}-dense", "--dense"),
        )
    return pairs


@pytest.fixture(scope="module")
def command(words: Any) -> Any:
    return functools.partial(words, train__max_steps=3)


@pytest.mark.parametrize(
    ("name", "engine", "world"),
    [("llama", "fsdp2", 3), ("gpt2", "zero3", 2), ("gpt2", "fsdp2", 2)],
)
def test_training_is_that_of_the_whole_weights(run: Runs, made, name, engine, world) -> None:
    low, dense = made[name]
    where = {"sharding__engine": engine, "sharding__base": "world"}
    one = run("dense", 1, model__path=str(dense))
    check_near(run("low", world, model__path=str(low), **where), one)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_attached_adapter_is_peft_s_on_the_whole_weights(made, dora: bool) -> None:
    low, dense = made["llama"]
    targets = ["q_proj", "down_proj", "v_proj"]
    theirs = peft.get_peft_model(
        loaded(dense), peft.LoraConfig(r=2, target_modules=targets, use_dora=dora)
    )
    ours = load_compressed(low, dtype="float32")
    attach(ours, LoraConfig(r=2, lora_alpha=8, target_modules=targets, use_dora=dora))
    found = dict(ours.named_parameters())
    with torch.no_grad():
        for path, parameter in theirs.named_parameters():
            if "lora_B" in path:
                parameter.normal_(0, 0.3)
            if parameter.requires_grad:
                name = path.removeprefix("base_model.model.").replace(".default", "")
                name = name.replace(".lora_", ".adapter.lora_").removesuffix(".weight")
                found[name].copy_(parameter)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    merge(ours)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    unmerge(ours)
    assert "weight" not in ours.model.layers[0].self_attn.q_proj._parameters


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("is_adapted", [False, True], ids=["base", "adapted"])
def test_a_compressed_model_is_copied_and_pickled(made, name, is_adapted, tmp_path) -> None:
    model = load_compressed(made[name][0], dtype="float32")
    if is_adapted:
        randomize_trainable(attach(model, LoraConfig(r=2)))
    torch.save(model, tmp_path / "model.pt")
    copies = [copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)]
    wanted = logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for copied in copies:
        assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(logits(copied), wanted)


def test_it_answers_as_the_whole_weights(made, capsys) -> None:
    answers = []
    for base in made["llama"]:
        words = ["--prompt", "Hi", "--dtype", "float32", "--max-new-tokens", "8"]
        generate.main(["--base", str(base), *words])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


def test_what_a_product_cannot_be_is_refused_by_name(made, tmp_path) -> None:
    low, dense = made["llama"]
    asked = functools.partial(options, low, tmp_path)
    quantized = refusal(preparation, asked(model__quantization="int8"))
    assert "model.quantization: cannot act on a compressed model" in quantized
    pissa = refusal(preparation, asked(adapter__init_lora_weights="pissa"))
    assert "pissa needs the weight of model.layers.0.self_attn.q_proj" in pissa
    attach(
        model := load_compressed(low, dtype="float32"), LoraConfig(r=2, target_modules=["q_proj"])
    )
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(low))
    words = ["--adapter", str(tmp_path / "adapter"), "--to", str(tmp_path / "merged")]
    assert "compressed" in refusal(export, [*words, "--merge"])
    words = ["--base", str(low), "--tuned", str(dense), "--rank", "2"]
    assert "compressed" in refusal(extract, [*words, "--to", str(tmp_path / "x")])


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([3], "config.json: dlora_low_rank: is no object"),
        ({"model.norm": 3}, "model.norm is no linear layer of the model"),
        ({"model.layers.0.self_attn.q_proj": 0}, "0 is no rank of a [40, 40]"),
        ({"model.layers.0.self_attn.q_proj": 4}, "do not belong together"),
    ],
    ids=["list", "norm", "zero", "other"],
)
def test_a_configuration_of_others_is_one_line(made, tmp_path, ranks, message) -> None:
    base = tmp_path / "base"
    shutil.copytree(made["llama"][0], base)
    before = json.loads((base / "config.json").read_text())["dlora_low_rank"]
    ranks = before | ranks if message.endswith("together") else ranks
    edit_json(base / "config.json", dlora_low_rank=ranks)
    words = ["--base", str(base), "--prompt", "x", "--dtype", "float32"]
    assert message in refusal(preparation, options(base, tmp_path))
    assert refusal(generate.main, words).startswith("--base: ")
