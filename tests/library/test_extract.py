"""What a full fine-tune changed comes back as an adapter, as PEFT and transformers compute it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from exported import Case, loaded, logits, made_by_peft, weights
from hostile import edit_json, starting_from
from programs import start, status
from refusals import preparation, refusal
from safetensors.torch import load_file, save_file
from torch import nn

from dlora import generate, load_adapter
from dlora.library.extract import main

CASES = [
    Case("llama", ["q_proj", "down_proj"]),
    Case("gpt2", ["c_attn"]),
    Case("llama", ["v_proj", "embed_tokens", "lm_head"]),
]


def extracted(base: Path, tuned: Path, to: Path, *words: str) -> Path:
    assert main(["--base", str(base), "--tuned", str(tuned), "--to", str(to), *words]) == 0
    return to


def by_peft(base: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(loaded(base), adapter).eval()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_merged_lora_comes_back_with_its_rank(case, bases, tmp_path) -> None:
    base = bases(case.base)
    origin = by_peft(base, made_by_peft(base, case, tmp_path / "origin"))
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in origin.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    wanted = logits(origin)
    origin.merge_and_unload().save_pretrained(tmp_path / "tuned")
    to = extracted(base, tmp_path / "tuned", tmp_path / "adapter", "--energy", "0.999999")
    found = by_peft(base, to)
    layers = json.loads((to / "extraction.json").read_text())["layers"]
    assert layers.keys() == deltas.keys()
    for path, delta in deltas.items():
        layer = found.base_model.model.get_submodule(path)
        got = layer.get_delta_weight("default")
        assert (got - delta).norm() <= 1e-5 * delta.norm(), path
        assert layer.r["default"] == layers[path]["rank"] == (3 if "q_proj" in path else 4)
    torch.testing.assert_close(logits(found), wanted, rtol=1e-4, atol=1e-4)
    ours = load_adapter(loaded(base), to).eval()
    torch.testing.assert_close(logits(ours), wanted, rtol=1e-4, atol=1e-4)


def tuned(base: Path, to: Path, change: Callable[[str, torch.Tensor], None]) -> Path:
    """A copy of a base whose parameters `change` has changed in place, in files of another size."""
    model = loaded(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change(name, parameter)
    model.save_pretrained(to, max_shard_size="60KB")
    return to


def add_low_rank(names: tuple[str, ...], rank: int = 2) -> Callable[[str, torch.Tensor], None]:
    """Adds products of that rank to the matrices, and to each of a stack, and noise to the rest."""

    def change(name: str, parameter: torch.Tensor) -> None:
        torch.manual_seed(len(name))
        if not name.endswith(names):
            return
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn_like(parameter)
            return
        *stack, m, n = parameter.shape
        parameter += 0.1 * torch.randn(*stack, m, rank) @ torch.randn(*stack, rank, n)

    return change


def test_norms_are_stored_whole_and_biases_are_named(bases, tmp_path, capsys) -> None:
    base = bases("gpt2")
    names = ("ln_1.weight", "ln_f.bias", "c_fc.weight", "c_fc.bias")
    after = tuned(base, tmp_path / "tuned", add_low_rank(names))
    to = extracted(base, after, tmp_path / "adapter", "--rank", "2")
    printed = capsys.readouterr().out
    record = json.loads((to / "extraction.json").read_text())
    left_out = record["not in the adapter"]
    assert [*left_out] == ["transformer.h.0.mlp.c_fc.bias", "transformer.h.1.mlp.c_fc.bias"]
    assert "transformer.h.1.mlp.c_fc.bias: NOT in the adapter, changed by " in printed
    stored = load_file(to / "adapter_model.safetensors")
    saved = json.loads((to / "adapter_config.json").read_text())["modules_to_save"]
    assert saved == ["ln_1", "ln_f"]
    wanted = loaded(after)
    assert torch.equal(
        stored["base_model.model.transformer.h.1.ln_1.weight"], wanted.transformer.h[1].ln_1.weight
    )
    original = loaded(base)
    with torch.no_grad():  # what the adapter cannot say
        for path in left_out:
            wanted.get_parameter(path).copy_(original.get_parameter(path))
    for model in (by_peft(base, to), load_adapter(loaded(base), to).eval()):
        torch.testing.assert_close(logits(model), logits(wanted.eval()), rtol=1e-4, atol=1e-4)


def test_what_was_zero_is_said_in_words_and_in_plain_json(bases, tmp_path, capsys) -> None:
    base = tuned(bases("gpt2"), tmp_path / "base", lambda n, p: p.zero_() if "bias" in n else None)
    after = tuned(base, tmp_path / "tuned", add_low_rank(("c_attn.weight", "c_attn.bias")))
    to = extracted(base, after, tmp_path / "adapter", "--rank", "2")
    assert "0.attn.c_attn.bias: NOT in the adapter, changed from zero: " in capsys.readouterr().out
    assert "Infinity" not in (to / "extraction.json").read_text()


def test_experts_are_adapted_one_by_one(bases, tmp_path) -> None:
    base = bases("mixtral")
    names = ("gate_up_proj", "down_proj", "gate.weight", "q_proj.weight")
    after = tuned(base, tmp_path / "tuned", add_low_rank(names))
    to = extracted(base, after, tmp_path / "adapter", "--energy", "0.9999")
    layers = json.loads((to / "extraction.json").read_text())["layers"]
    assert layers["model.layers.1.mlp.experts.down_proj"]["rank"] == 2
    wanted = logits(loaded(after).eval())
    for model in (by_peft(base, to), load_adapter(loaded(base), to).eval()):
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_a_tied_weight_is_adapted_on_both_sides(bases, tmp_path) -> None:
    base = bases("tied")
    after = tuned(base, tmp_path / "tuned", add_low_rank(("embed_tokens.weight",)))
    assert (model := loaded(after)).lm_head.weight is model.model.embed_tokens.weight
    to = extracted(base, after, tmp_path / "adapter", "--rank", "2")
    wanted = logits(loaded(after).eval())
    for model in (by_peft(base, to), load_adapter(loaded(base), to).eval()):
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_ranks_are_those_of_peft_s_conversion(bases, tmp_path) -> None:
    """Of a LoHa, whose ΔW is no product of low rank."""
    base = bases("llama")
    model = peft.get_peft_model(loaded(base), peft.LoHaConfig(r=3, target_modules=["q_proj"]))
    torch.manual_seed(0)
    for _name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 0, 0.3)
    config, wanted = peft.convert_to_lora(model, rank=0.8)
    model.merge_and_unload().save_pretrained(tmp_path / "tuned")
    to = extracted(base, tmp_path / "tuned", tmp_path / "adapter", "--energy", "0.8")
    got = load_file(to / "adapter_model.safetensors")
    assert got.keys() == wanted.keys()
    for key in [key for key in got if "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        assert got[key].shape == wanted[key].shape and 1 < len(got[key]) < 9
        delta = wanted[other] @ wanted[key]
        assert (got[other] @ got[key] - delta).norm() <= 1e-4 * delta.norm()


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_bytes_are_the_same_on_two_ranks(bases, tmp_path) -> None:
    """As torchrun starts them; a mistake is one line of all ranks."""
    base = bases("llama")
    after = tuned(base, tmp_path / "tuned", lambda _, p: p.add_(0.01 * torch.randn_like(p)))
    words = ["--base", str(base), "--tuned", str(after), "--energy", "0.5", "--to"]
    torch.set_num_threads(1)  # as the ranks have
    main([*words, str(tmp_path / "one")])
    log, here = tmp_path / "log", {"OMP_NUM_THREADS": "1"}
    assert status(start(2, ["dlora", "extract", *words, str(tmp_path / "two")], log, **here)) == 0
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "one", "tuned", "two"]
    log.unlink()
    assert status(start(2, ["dlora", "extract", *words, str(tmp_path / "two")], log, **here)) == 2
    refused = f"--to: {tmp_path / 'two'} is not empty; name a new or empty directory"
    assert log.read_text() == f"dlora: error: {refused}\n"


def test_it_is_trained_on_and_answers(bases, tmp_path, capsys) -> None:
    """As the tuned model would: with its chat template, and where it ends."""
    base = bases("llama")
    after = tuned(base, tmp_path / "tuned", add_low_rank(("q_proj.weight",)))
    for path in base.iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, after / path.name)
    (after / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    edit_json(after / "generation_config.json", eos_token_id=[2, 5, 7])
    to = extracted(base, after, tmp_path / "adapter", "--rank", "2")
    assert (to / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}!"
    assert json.loads((to / "generation_config.json").read_text())["eos_token_id"] == [2, 5, 7]
    capsys.readouterr()
    words = ["--prompt", "Hi", "--dtype", "float32", "--max-new-tokens", "8"]
    generate.main(["--adapter", str(to), *words])
    answer = capsys.readouterr().out
    generate.main(["--base", str(after), *words])
    assert capsys.readouterr().out == answer != ""
    assert preparation(starting_from(to, base)).lora.r == 2


MISTAKES = {  # words after --to DIR; what the message says
    "no cut": (["--base", "B", "--tuned", "T"], "one of the arguments --rank --energy is required"),
    "two cuts": (
        ["--base", "B", "--tuned", "T", "--rank", "2", "--energy", "1"],
        "not allowed with",
    ),
    "rank": (
        ["--base", "B", "--tuned", "T", "--rank", "0"],
        "--rank: must be a whole number from 1",
    ),
    "energy": (
        ["--base", "B", "--tuned", "T", "--energy", "1.1"],
        "--energy: must be a number abov",
    ),
    "no base": (["--base", "./nix", "--tuned", "T", "--rank", "2"], "--base: directory ./nix does"),
    "no model": (["--base", "B", "--tuned", "E", "--rank", "2"], "--tuned: E contains no config"),
    "unchanged": (["--base", "B", "--tuned", "B", "--rank", "2"], "so there is nothing to extract"),
    "class": (["--base", "B", "--tuned", "gpt2", "--rank", "2"], "gpt2 is a GPT2LMHeadModel, and"),
    "vocabulary": (
        ["--base", "B", "--tuned", "larger", "--rank", "2"],
        "(as of a resized vocabular",
    ),
    "lacking": (["--base", "B", "--tuned", "lacking", "--rank", "2"], "do not contain model.norm"),
    "extra": (
        ["--base", "B", "--tuned", "extra", "--rank", "2"],
        "--tuned: extra.weight is in extra",
    ),
    "biases": (
        ["--base", "G", "--tuned", "biases", "--rank", "2"],
        "0.mlp.c_fc.bias and 1 more alone",
    ),
    "quantized": (
        ["--base", "packed", "--tuned", "T", "--rank", "2"],
        "--base: packed is quantized",
    ),
    "NaN": (
        ["--base", "B", "--tuned", "nan", "--rank", "2"],
        "q_proj.weight contains NaN or infin",
    ),
    "itself": (["--base", "B", "--tuned", "T", "--rank", "2", "--to", "B"], "B is a model"),
    "full": (["--base", "B", "--tuned", "T", "--rank", "2", "--to", "site"], "site is not empty"),
}


@pytest.fixture(scope="module")
def site(bases, tmp_path_factory) -> Path:
    """The directories that the mistakes name."""
    site = tmp_path_factory.mktemp("site")
    for name, base in (("B", "llama"), ("G", "gpt2"), ("gpt2", "gpt2")):
        (site / name).symlink_to(bases(base))
    (site / "E").mkdir()
    (site / "site").mkdir()
    (site / "site/file").touch()
    base = bases("llama")
    tuned(base, site / "T", add_low_rank(("q_proj.weight",)))
    tuned(bases("gpt2"), site / "biases", add_low_rank(("c_fc.bias",)))
    model = loaded(base)
    model.resize_token_embeddings(300)
    model.save_pretrained(site / "larger")
    for name in ("lacking", "extra", "nan", "packed"):
        (site / name).mkdir()
        shutil.copy(base / "config.json", site / name)
        tensors = weights(base)
        if name == "lacking":
            del tensors["model.norm.weight"]
        elif name == "extra":
            tensors["extra.weight"] = torch.ones(2)
        elif name == "nan":
            tensors["model.layers.1.self_attn.q_proj.weight"][1, 2] = torch.nan
        save_file(tensors, site / name / "model.safetensors", metadata={"format": "pt"})
    edit_json(site / "packed/config.json", quantization_config={"quant_method": "fp8"})
    return site


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(mistake, site, monkeypatch) -> None:
    monkeypatch.chdir(site)
    before = sorted(site.rglob("*"))
    words, message = MISTAKES[mistake]
    target = [] if "--to" in words else ["--to", "new"]
    assert message in refusal(main, [*target, *words])
    assert sorted(site.rglob("*")) == before
