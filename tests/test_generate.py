"""`dlora.generate` answers as transformers and PEFT do, and prints nothing but the answer."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from exported import loaded, plain_adapter, write_checkpoint
from gguf_files import real_file
from hostile import edit_json
from refusals import refusal
from torch import nn
from transformers import AutoTokenizer

from dlora import LoraConfig, attach, save_adapter
from dlora.base.model import find_base
from dlora.errors import UsageError
from dlora.generate import main
from dlora.lora.attach import named_adapters
from dlora.lora.init import INITS

ROOT = Path(__file__).parent.parent
QUESTION = "one two three?"
FLOAT = ["--dtype", "float32", "--max-new-tokens", "24"]


def answer(model: nn.Module, base: Path, messages: list[dict[str, str]] | str) -> str:
    """What transformers' own `generate` answers, after the template or on plain text."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    if isinstance(messages, str):
        inputs = tokenizer(messages, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    ids = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def printed(capsys, argv: list[str]) -> str:
    """Standard output of a command that succeeds and says nothing else."""
    capsys.readouterr()
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_adapter_answers_as_in_stock_peft(bases, tmp_path, capsys):
    adapter = plain_adapter(bases, tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(loaded(bases("llama")), adapter).eval()
    user = {"role": "user", "content": QUESTION}
    ours = printed(capsys, ["--adapter", str(adapter), "--prompt", QUESTION, *FLOAT])
    assert ours == answer(model, bases("llama"), [user]) + "\n"
    assert len(ours) > 5

    base = printed(capsys, ["--base", str(bases("llama")), "--prompt", QUESTION, *FLOAT])
    assert base == answer(loaded(bases("llama")), bases("llama"), [user]) + "\n" != ours

    words = ["--adapter", str(adapter), "--prompt", QUESTION, "--system", "Be brief.", *FLOAT]
    system = {"role": "system", "content": "Be brief."}
    assert printed(capsys, words) == answer(model, bases("llama"), [system, user]) + "\n"

    words = ["--adapter", str(adapter), "--prompt", QUESTION, *FLOAT, "--temperature"]
    assert printed(capsys, [*words, "0.00001"]) == ours != printed(capsys, [*words, "10"])


def test_checkpoint_answers_as_its_run_would(bases, tmp_path, capsys):
    directory, model = write_checkpoint(bases("llama"), tmp_path)
    expected = answer(model, bases("llama"), [{"role": "user", "content": QUESTION}])
    words = ["--adapter", str(directory), "--prompt", QUESTION, *FLOAT]
    assert printed(capsys, words) == expected + "\n"


def test_plain_text_without_a_template(bases, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(bases("gpt2"), base)
    (base / "chat_template.jinja").unlink()
    expected = answer(loaded(base), base, QUESTION)
    assert printed(capsys, ["--base", str(base), "--prompt", QUESTION, *FLOAT]) == expected + "\n"
    with pytest.raises(UsageError, match="--system cannot act"):
        main(["--base", str(base), "--prompt", QUESTION, "--system", "x"])


def test_answer_stops_at_the_last_position(bases, capsys):
    """GPT-2 has 256 learned positions; it would fail beyond them."""
    words = ["--base", str(bases("gpt2")), "--dtype", "float32"]
    assert main([*words, "--prompt", "x" * 200, "--max-new-tokens", "500"]) == 0
    assert "at most 256" in capsys.readouterr().err
    with pytest.raises(UsageError, match="the base takes at most 256"):
        main([*words, "--prompt", "x" * 300])


MISTAKES = {
    "neither": (["--prompt", "x"], "give --base, --adapter, or both"),
    "prompt": (["--base", "B"], "required: --prompt"),
    "empty": (["--base", "B", "--prompt", ""], "--prompt: is empty"),
    "tokens": (["--base", "B", "--prompt", "x", "--max-new-tokens", "-3"], "of at least 1"),
    "heat": (["--base", "B", "--prompt", "x", "--temperature", "-1"], "of at least 0, not '-1'"),
    "dtype": (["--base", "B", "--prompt", "x", "--dtype", "fp8"], "--dtype: invalid choice: 'fp8'"),
    "code": (["--base", "x.gguf", "--prompt", "x", "--trust-remote-code"], "cannot act"),
    "base": (["--base", "./nix", "--prompt", "x"], "--base: directory ./nix does not exist"),
    "image model": (["--base", "vit", "--prompt", "x"], "cannot read vit: Unrecognized config"),
    "adapter": (["--adapter", "nix", "--prompt", "x"], "--adapter: directory nix does not exist"),
    "gone": (["--adapter", "gone", "--prompt", "x"], "the base of gone (--base overrides it): "),
    "nameless": (["--adapter", "nameless", "--prompt", "x"], "add --base"),
    "unfit": (["--adapter", "A", "--base", "gpt2", "--prompt", "x"], "A does not fit the base"),
}


@pytest.fixture(scope="module")
def site(bases, tmp_path_factory) -> Path:
    """The files that the mistakes name."""
    site = tmp_path_factory.mktemp("site")
    for name, base in {"A": str(bases("llama")), "gone": "./old/base", "nameless": None}.items():
        settings = plain_adapter(bases, site / name) / "adapter_config.json"
        edit_json(settings, base_model_name_or_path=base)
    (site / "B").symlink_to(bases("llama"))
    (site / "gpt2").symlink_to(bases("gpt2"))
    (site / "vit").mkdir()
    (site / "vit/config.json").write_text('{"model_type": "vit"}')
    for file in bases("llama").glob("tokenizer*"):
        shutil.copy(file, site / "vit")
    return site


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, site, monkeypatch, capsys):
    monkeypatch.chdir(site)
    words, message = MISTAKES[mistake]
    assert message in refusal(main, words)
    assert capsys.readouterr().out == ""


def test_status_and_output_of_the_command_itself(bases, tmp_path):
    command = [sys.executable, "-m", "dlora", "generate"]
    ended = subprocess.run([*command, "--nix"], capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == "" and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("dlora: error: ")


def test_the_real_model_answers_word_by_word(tmp_path, monkeypatch):
    """SmolLM2 with an untrained adapter, in a run's directory, which knows the converted base."""
    gguf, cache = real_file(), ROOT / "models/converted"
    model = {"path": str(gguf), "cache_dir": str(cache)}
    (tmp_path / "config.yaml").write_text(json.dumps({"model": model}))
    skeleton = find_base(str(gguf), cache_dir=str(cache)).skeleton()
    attach(skeleton, LoraConfig(r=1, target_modules=["q_proj"]))
    for _, _, adapter in named_adapters(skeleton):
        adapter.to_empty(device="cpu").reset(is_embedding=False, init=INITS[True])
    save_adapter(skeleton, tmp_path / "adapter", base_model_name_or_path=str(gguf))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    pieces: list[str] = []
    monkeypatch.setattr(sys.stdout, "write", pieces.append)
    prompt = "What is the capital of France?"
    words = ["--adapter", str(tmp_path / "adapter"), "--prompt", prompt, "--max-new-tokens", "8"]
    assert main(words) == 0
    assert "".join(pieces) == "The capital of France is Paris.\n"
    assert len([piece for piece in pieces if piece.strip()]) > 3
    assert not (tmp_path / "home").exists()  # nothing was converted once more
