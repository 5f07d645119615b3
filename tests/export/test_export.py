"""What `dlora.export` writes computes what the live adapted model, and PEFT, compute."""

import json

import peft
import pytest
import torch
from exported import Case, attach_random, load_live, logits, made_by_peft, weights, write_checkpoint
from safetensors.torch import load_file
from tiny import tokenizer
from tiny import whole as loaded
from transformers import AutoModelForCausalLM

from dlora import LoraConfig, save_adapter
from dlora.export.command import main

CASES = [
    Case("llama", "all-linear"),
    Case("llama", ["q_proj", "embed_tokens", "lm_head"], ("norm",)),
    Case("tied", "all-linear"),
    Case("tied", ["q_proj", "embed_tokens"], untied=True),
    Case("tied", ["down_proj", "lm_head"], untied=True),
    Case("tied", ["o_proj"], ("lm_head",), untied=True),
    Case("gpt2", "all-linear"),
    Case("gpt2-bare", ["c_attn", "wte"], ("ln_f",), untied=True),
    Case("mistral", ["gate_proj", "v_proj"]),
    Case("llama", "all-linear", dora=True),
    Case("gpt2-bare", ["c_attn", "wte"], ("ln_f",), dora=True, untied=True),
    Case("mixtral", ["q_proj", "v_proj"], ("lm_head",)),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merged_model_computes_what_peft_and_the_live_model_compute(case, bases, tmp_path, capsys):
    base = bases(case.base)
    adapter = made_by_peft(base, case, tmp_path / "adapter")
    # in float64 there would be no doubt; here float32 models are compared at 1e-5
    theirs = peft.PeftModel.from_pretrained(loaded(base), adapter).eval()
    expected = [logits(load_live(base, adapter)), logits(theirs)]
    if not case.untied:
        expected.append(logits(theirs.merge_and_unload()))
    assert not torch.allclose(expected[0], logits(loaded(base)), atol=0.1)

    assert main(["--adapter", str(adapter), "--to", str(tmp_path / "merged"), "--merge"]) == 0
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype="auto", output_loading_info=True
    )
    assert model.dtype == torch.float32 and not any(report.values()), report
    for reference in expected:
        torch.testing.assert_close(logits(model.eval()), reference, rtol=1e-5, atol=2e-5)

    before, after = weights(base), weights(tmp_path / "merged")
    new = after.keys() - before.keys()
    assert not before.keys() - after.keys() and new == (
        {"lm_head.weight"} if case.untied else set()
    )
    for key in before:
        if "norm" in key and not case.saved:  # never adapted
            assert torch.equal(before[key], after[key])
    config = json.loads((tmp_path / "merged/config.json").read_text())
    config_before = json.loads((base / "config.json").read_text())
    changed = {key for key in config if config[key] != config_before.get(key)}
    assert changed == ({"tie_word_embeddings"} if case.untied else set())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (base / name).exists():
            assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    own, end = loaded(base).generation_config.eos_token_id, tokenizer().eos_token_id
    ends = loaded(tmp_path / "merged").generation_config.eos_token_id
    assert ends == (own if own == end else [own, end])  # and the end of a turn


def test_checkpoint_becomes_a_plain_adapter_and_a_merged_model(bases, tmp_path):
    directory, model = write_checkpoint(bases("llama"), tmp_path)
    assert main(["--adapter", str(directory), "--to", str(tmp_path / "plain")]) == 0
    stock = peft.PeftModel.from_pretrained(loaded(bases("llama")), tmp_path / "plain").eval()
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=2e-5)
    raw = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == str(bases("llama"))

    (tmp_path / "merged").mkdir()  # an empty directory may be there
    assert main(["--adapter", str(directory), "--to", str(tmp_path / "merged"), "--merge"]) == 0
    torch.testing.assert_close(
        logits(loaded(tmp_path / "merged")), logits(model), rtol=1e-5, atol=2e-5
    )
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


def test_plain_adapter_of_peft_s_is_rewritten_without_change(bases, tmp_path):
    case = Case("gpt2", "all-linear")
    adapter = made_by_peft(bases("gpt2"), case, tmp_path / "adapter")
    assert main(["--adapter", str(adapter), "--to", str(tmp_path / "plain")]) == 0
    old, new = (load_file(d / "adapter_model.safetensors") for d in (adapter, tmp_path / "plain"))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    stock = [
        peft.PeftModel.from_pretrained(loaded(bases("gpt2")), directory).eval()
        for directory in (adapter, tmp_path / "plain")
    ]
    torch.testing.assert_close(logits(stock[1]), logits(stock[0]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_sums_are_cast_once_and_loss_is_measured(dtype, bases, tmp_path, capsys):
    base = bases("llama", torch.bfloat16)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"])
    model = attach_random(loaded(base), config, std=0.05)
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(base))
    argv = ["--adapter", str(tmp_path / "adapter"), "--to", str(tmp_path / "merged"), "--merge"]
    assert main(argv + (["--dtype", dtype] if dtype else [])) == 0
    target = getattr(torch, dtype or "bfloat16")

    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    before, after = weights(base), weights(tmp_path / "merged")
    assert all(tensor.dtype == target for tensor in after.values())
    losses = {}
    for key, tensor in before.items():
        factors = [f"base_model.model.{key[:-7]}.lora_{f}.weight" for f in "AB"]
        expected = tensor.double()
        if factors[0] in adapter:
            a, b = (adapter[factor].double() for factor in factors)
            delta = b @ a * 3 / 2
            losses[key[:-7]] = float(
                ((after[key].double() - expected) - delta).norm() / delta.norm()
            )
            expected = expected + delta
        bound = {torch.float32: 2**-23, torch.float16: 2**-11, torch.bfloat16: 2**-8}[target]
        error = (after[key].double() - expected).abs()
        assert (error <= bound * expected.abs() * 1.001 + 2**-24).all()
    worst = max(losses, key=losses.__getitem__)
    lines = capsys.readouterr().err.splitlines()
    assert (losses[worst] > 0.01) == (dtype is None)
    assert len(lines) == (1 if dtype is None else 0)
    assert not lines or f"worst: {losses[worst]:.1%} in {worst}" in lines[0]
    written = json.loads((tmp_path / "merged/config.json").read_text())
    assert written["dtype"] == str(target).removeprefix("torch.")


def test_large_tensors_pass_in_blocks_and_shards(bases, tmp_path, monkeypatch):
    """The same files, whatever the size of blocks, and shards within their size."""
    base = bases("tied", torch.bfloat16)
    config = LoraConfig(r=2, target_modules=["embed_tokens", "o_proj"])
    save_adapter(attach_random(loaded(base), config), tmp_path / "adapter")
    argv = ["--adapter", str(tmp_path / "adapter"), "--base", str(base), "--merge", "--to"]
    main([*argv, str(tmp_path / "whole")])
    monkeypatch.setattr("dlora.io.safetensors.BLOCK_BYTES", 300)
    monkeypatch.setattr("dlora.io.safetensors.BLOCK_BYTES", 300)
    monkeypatch.setattr("dlora.io.safetensors.SHARD_BYTES", 15_000)
    main([*argv, str(tmp_path / "blocks")])
    whole, blocks = weights(tmp_path / "whole"), weights(tmp_path / "blocks")
    assert whole.keys() == blocks.keys()
    assert all(torch.equal(whole[key], blocks[key]) for key in whole)
    index = json.loads((tmp_path / "blocks/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    for file in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "blocks" / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 15_000
