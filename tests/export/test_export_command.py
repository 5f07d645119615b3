"""How `dlora.export` refuses, where it finds bases, and what memory it takes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exported import Case, loaded, logits, made_by_peft, plain_adapter, weights
from hostile import edit_json
from refusals import refusal
from safetensors.torch import load_file, save_file
from tiny import save_filled
from torch import nn

from dlora import LoraConfig, attach, load_adapter, save_adapter
from dlora.errors import UsageError
from dlora.export.command import main
from dlora.lora.attach import named_adapters

QUERY = "model.layers.1.self_attn.q_proj.weight"


def test_peft_s_copies_of_embeddings_must_be_the_base_s(bases, tmp_path):
    case = Case("llama", ["q_proj", "embed_tokens"])
    adapter = made_by_peft(bases("llama"), case, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"][2, 3] += 1
    save_file(tensors, file)
    with pytest.raises(UsageError, match="trained on another model.embed_tokens.weight"):
        main(["--adapter", str(adapter), "--to", str(tmp_path / "merged"), "--merge"])
    assert not (tmp_path / "merged").exists() and len(list(tmp_path.iterdir())) == 1


MISTAKES = {  # words after --adapter; what the message says
    "option": (["A", "--to", "B", "--foo"], "unrecognized arguments: --foo"),
    "missing": (["A"], "required: --to"),
    "no adapter": (["nix", "--to", "B"], "--adapter: directory nix does not exist"),
    "no such adapter": (["E", "--to", "B"], "E has neither an adapter_config.json nor"),
    "run": (["run", "--to", "B"], "did you mean run/adapter?"),
    "no base": (["A", "--to", "B", "--base", "./nix"], "--base: directory ./nix does not exist"),
    "no model": (["A", "--to", "B", "--base", "E"], "--base: E contains no config.json"),
    "full": (["A", "--to", "run"], "--to: run is not empty"),
    "file": (["A", "--to", "file"], "--to: file is not a directory"),
    "itself": (["A", "--to", "A"], "--to: A is the adapter itself"),
    "dtype": (["A", "--to", "B", "--merge", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    "idle dtype": (["A", "--to", "B", "--dtype", "float32"], "--dtype cannot act without --merge"),
    "other base": (["A", "--to", "B", "--base", "gpt2"], "A does not fit the base: target_modules"),
    "other shape": (
        ["A", "--to", "B", "--merge", "--base", "wide"],
        "but the base needs floats",
    ),
    "renamed": (["A", "--to", "B", "--merge", "--base", "odd"], "model.layers.1.self_attn.q_proj"),
    "peft type": (["ia3", "--to", "B"], "peft_type is 'IA3'"),
}


@pytest.fixture(scope="module")
def site(bases, tmp_path_factory) -> Path:
    """The files that the mistakes name."""
    site = tmp_path_factory.mktemp("site")
    for name in ("A", "ia3", "run/adapter"):
        plain_adapter(bases, site / name)
    edit_json(site / "ia3/adapter_config.json", peft_type="IA3")
    (site / "E").mkdir()
    (site / "file").touch()
    (site / "gpt2").symlink_to(bases("gpt2"))
    for name in ("wide", "odd"):
        shutil.copytree(bases("llama"), site / name)
    edit_json(site / "wide/config.json", num_attention_heads=2, head_dim=40)
    file = next(f for f in (site / "odd").glob("*.safetensors") if QUERY in load_file(f))
    save_file({k.replace(QUERY, f"{QUERY}s"): t for k, t in load_file(file).items()}, file)
    return site


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(mistake, site, monkeypatch):
    monkeypatch.chdir(site)
    before = sorted(site.rglob("*"))
    words, message = MISTAKES[mistake]
    assert message in refusal(main, ["--adapter", *words])
    assert sorted(site.rglob("*")) == before


def test_status_and_one_line_of_the_command_itself(tmp_path):
    ended = command("--adapter", "nix", "--to", "x", cwd=tmp_path)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == "dlora: error: --adapter: directory nix does not exist\n"


def test_base_from_the_hub_s_cache(bases, tmp_path):
    folder, commit = tmp_path / "hub/models--owner--tiny", "0123456789" * 4
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    shutil.copytree(bases("llama"), folder / "snapshots" / commit)
    adapter = plain_adapter(bases, tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="owner/tiny")
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    words = ["--adapter", "adapter", "--to", "merged", "--merge"]
    ended = command(*words, cwd=tmp_path, **offline)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    live = load_adapter(loaded(bases("llama")), adapter).eval()
    merged = loaded(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(live), rtol=1e-5, atol=2e-5)
    assert (tmp_path / "merged/tokenizer.json").is_file()


def command(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dlora.export", *words],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


MEASURED = """
import sys, threading
import torch, transformers
from dlora.export.command import main

def private():
    with open("/proc/self/smaps_rollup") as rollup:
        fields = (line.split() for line in rollup)
        return sum(int(f[1]) << 10 for f in fields if f[0].startswith("Private_"))

main([*sys.argv[1:], "--to", "plain"])  # what the first use of anything costs
before = highest = private()
done = threading.Event()

def watch():
    global highest
    while not done.wait(0.002):
        highest = max(highest, private())

watcher = threading.Thread(target=watch)
watcher.start()
main([*sys.argv[1:], "--to", "merged", "--merge"])
done.set()
watcher.join()
print("PEAK", highest - before)
"""


def test_merging_400_mb_takes_a_few_blocks_of_memory(tmp_path):
    """promise 1.14: merging streams, in the memory of a few blocks."""
    sizes = {"vocab_size": 8192, "intermediate_size": 4096, "num_hidden_layers": 11}
    skeleton = save_filled(tmp_path / "base", torch.bfloat16, 0.5, **sizes)
    assert 4e8 < sum(parameter.nbytes for parameter in skeleton.parameters()) < 4.5e8
    targets = ["q_proj", "embed_tokens"]
    attach(skeleton, LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    for _, _, adapter in named_adapters(skeleton):
        adapter.to_empty(device="cpu")
        nn.init.ones_(adapter.lora_A)
        nn.init.ones_(adapter.lora_B)
    save_adapter(skeleton, tmp_path / "adapter")

    words = ["--adapter", "adapter", "--base", "base"]
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    largest = 8192 * 1024 * 4  # ΔW of the embeddings in float32
    peak = int(ended.stdout.rpartition("PEAK")[2])
    assert largest < peak < largest + 60e6, f"{peak / 1e6:.0f} MB"
    for key, tensor in weights(tmp_path / "merged").items():
        adapted = any(f"{name}." in key for name in targets)
        assert (tensor == (4.5 if adapted else 0.5)).all()
    shutil.rmtree(tmp_path)  # pytest would keep 800 MB of the last three sessions each
