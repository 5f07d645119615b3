"""Files for llama.cpp: read back by the `gguf` package and by transformers, beside PEFT."""

import copy
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
from exported import IDS, Case, attach_random, loaded, logits, made_by_peft, write_checkpoint
from gguf_files import convert, tiny_llama
from refusals import refusal
from tiny import CHATML, command, tokenizer
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from dlora import LoraConfig, save_adapter
from dlora.export.command import main
from dlora.export.modelfile import modelfile
from dlora.export.serving import serving_lines
from dlora.lora.attach import named_adapters
from dlora.train import main as train

HEADS = {"q_proj": 4, "k_proj": 2}
SIZES = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]
assert IDS.max() < SIZES["vocab_size"]
BASES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama3": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "biased": lambda: LlamaConfig(**SIZES, attention_bias=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=128),
}


def save_base(directory: Path, name: str) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BASES[name](), dtype=torch.float32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.15)
    model.save_pretrained(directory)
    merging_tokenizer().save_pretrained(directory)
    return directory


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of bytes, with a few merges: llama.cpp reads none without."""
    made = tokenizer()
    described = json.loads(made.backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    for pair in MERGES:
        vocabulary["".join(pair)] = len(vocabulary)
    last = len(vocabulary) - len(MERGES)
    assert last == 259
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    core.pre_tokenizer, core.decoder = (
        made.backend_tokenizer.pre_tokenizer,
        made.backend_tokenizer.decoder,
    )
    merging = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
    )
    merging.chat_template = made.chat_template
    return merging


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    return values, {t.name: np.array(t.data) for t in reader.tensors}


def check_logits(got: nn.Module, wanted: nn.Module) -> None:
    """Equal but for the rounding of weights, a share of the largest; computed in float64.

    In float32 kernels of some CPUs round a sum further than that.
    """
    found, expected = (logits(copy.deepcopy(model).double()) for model in (got, wanted))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def turned_back(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows in transformers' order: pair i of a head has rows i and i + d/2 there."""
    size = rows.shape[0] // heads
    order = [
        head * size + pair + half * (size // 2)
        for head in range(heads)
        for pair in range(size // 2)
        for half in (0, 1)
    ]
    found = np.empty_like(rows)
    found[order] = rows
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_has_the_changes_that_peft_computes(
    name: str, rslora: bool, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", name)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules="all-linear",
        rank_pattern={"q_proj": 3},
        alpha_pattern={"up_proj": 5},
        use_rslora=rslora,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(loaded(base), settings)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, 0, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    words = ["--adapter", str(tmp_path / "adapter"), "--to", str(tmp_path / "to")]
    assert main([*words, "--format", "gguf"]) == 0
    values, tensors = read(tmp_path / "to/adapter.gguf")
    assert values["general.type"] == "adapter"
    assert values["adapter.type"] == "lora"
    assert values["adapter.lora.alpha"] == 6
    assert values["general.architecture"] == name
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    assert len(tensors) == 2 * 2 * len(names)
    for path, module in model.base_model.model.named_modules():
        word = path.rpartition(".")[2]
        if word not in names:
            continue
        place = f"blk.{path.split('.')[2]}.{names[word]}.weight"
        down, up = (tensors[f"{place}.lora_{side}"].astype(np.float64) for side in "ab")
        # As llama.cpp does: scale = alpha / r, r being the rows of A.
        delta = values["adapter.lora.alpha"] / down.shape[0] * (up @ down)
        if name == "llama" and word in HEADS:
            delta = turned_back(delta, HEADS[word])
        expected = module.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in BASES if name != "biased"])
def test_a_merged_model_has_the_logits_in_transformers(name: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", name)
    adapter = made_by_peft(base, Case(name, ["q_proj", "k_proj", "up_proj"]), tmp_path / "adapter")
    words = ["--adapter", str(adapter), "--to", str(tmp_path / "to"), "--merge"]
    assert main([*words, "--format", "gguf", "--dtype", "float32"]) == 0
    values, tensors = read(tmp_path / "to/model.gguf")
    assert values["general.type"] == "model"
    assert ("output.weight" in tensors) == (name != "tied")
    assert all(array.dtype == np.float32 for array in tensors.values())
    live = peft.PeftModel.from_pretrained(loaded(base), adapter).eval()
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "to", gguf_file="model.gguf", dtype=torch.float32
    )
    if name == "llama3":  # transformers does not read these factors
        factors = tensors["rope_freqs.weight"]
        plain = 1 / 10000.0 ** (np.arange(0, 16, 2) / 16)
        scaled = live.base_model.model.model.rotary_emb.inv_freq.numpy()
        np.testing.assert_allclose(plain / factors, scaled, rtol=1e-6)
        again.model.rotary_emb = live.base_model.model.model.rotary_emb
    check_logits(again, live.merge_and_unload())
    if name != "llama":
        return
    texts = ["Hello the world 123", "<|im_start|>user\nüber the<|im_end|>"]
    read_back = AutoTokenizer.from_pretrained(tmp_path / "to", gguf_file="model.gguf")
    for text in texts:
        assert read_back(text).input_ids == AutoTokenizer.from_pretrained(base)(text).input_ids
    assert read_back.chat_template == tokenizer().chat_template
    assert read_back.eos_token == "<|im_end|>"


def test_a_base_from_a_gguf_keeps_its_metadata_and_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache of conversions
    file = tiny_llama(tmp_path / "base.gguf", types=(gguf.GGMLQuantizationType.F32,))
    converted, _ = convert(file, tmp_path / "cache")
    model = attach_random(loaded(converted), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    save_adapter(model, tmp_path / "adapter")
    words = ["--adapter", str(tmp_path / "adapter"), "--base", str(file), "--format", "gguf"]
    merge = ["--merge", "--dtype", "float32", "--to", str(tmp_path / "merged")]
    assert main([*words, *merge]) == 0
    before, weights = read(file)
    after, changed = read(tmp_path / "merged/model.gguf")
    own = {"general.file_type", "general.type", "GGUF.kv_count"}
    assert {k: v for k, v in after.items() if k not in own} == {
        k: v for k, v in before.items() if k not in own
    }
    assert weights.keys() == changed.keys()
    same = {name for name in weights if np.array_equal(weights[name], changed[name])}
    assert weights.keys() - same == {f"blk.{i}.attn_{w}.weight" for i in (0, 1) for w in "qv"}
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", gguf_file="model.gguf", dtype=torch.float32
    )
    check_logits(again, model)
    # The adapter's Modelfile names the file that Ollama has as well.
    assert main([*words, "--to", str(tmp_path / "to")]) == 0
    lines = (tmp_path / "to/Modelfile").read_text().splitlines()
    assert lines[:2] == [f"FROM {file}", "ADAPTER ./adapter.gguf"]


def test_half_precision_keeps_vectors_in_float32(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = made_by_peft(base, Case("llama", ["q_proj"]), tmp_path / "adapter")
    words = ["--adapter", str(adapter), "--merge", "--format", "gguf"]
    for dtype, kind in (("bfloat16", "BF16"), ("float16", "F16")):
        assert main([*words, "--dtype", dtype, "--to", str(tmp_path / dtype)]) == 0
        assert main([*words[:-2], "--dtype", dtype, "--to", str(tmp_path / f"hf-{dtype}")]) == 0
        found = gguf.GGUFReader(tmp_path / dtype / "model.gguf").tensors
        kinds = {t.tensor_type.name for t in found if len(t.shape) > 1}
        assert kinds == {kind}
        assert {t.tensor_type.name for t in found if len(t.shape) == 1} == {"F32"}
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path / dtype, gguf_file="model.gguf", dtype=torch.float32
        )
        wanted = loaded(tmp_path / f"hf-{dtype}")  # the same weights, in float32
        torch.testing.assert_close(logits(again), logits(wanted), rtol=1e-5, atol=1e-5)


def test_a_bias_has_the_order_of_its_rows(tmp_path: Path) -> None:
    """Which transformers does not turn back for a Llama."""
    base = save_base(tmp_path / "base", "biased")
    adapter = made_by_peft(base, Case("biased", ["v_proj"]), tmp_path / "adapter")
    words = ["--adapter", str(adapter), "--to", str(tmp_path / "to"), "--merge"]
    assert main([*words, "--format", "gguf", "--dtype", "float32"]) == 0
    _, tensors = read(tmp_path / "to/model.gguf")
    for index, layer in enumerate(loaded(base).model.layers):
        for word, heads in HEADS.items():
            found = tensors[f"blk.{index}.attn_{word[0]}.bias"]
            wanted = getattr(layer.self_attn, word).bias.detach().numpy()
            np.testing.assert_array_equal(turned_back(found, heads), wanted)


def test_a_checkpoint_is_read_too(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    directory, model = write_checkpoint(
        base, tmp_path / "run", r=3, use_rslora=True, target_modules=["v_proj"]
    )
    words = ["--adapter", str(directory), "--to", str(tmp_path / "to"), "--format", "gguf"]
    assert main(words) == 0
    values, tensors = read(tmp_path / "to/adapter.gguf")
    adapters = {path: adapter for path, _, adapter in named_adapters(model)}
    for index in (0, 1):
        down, up = (tensors[f"blk.{index}.attn_v.weight.lora_{side}"] for side in "ab")
        adapter = adapters[f"model.layers.{index}.self_attn.v_proj"]
        delta = values["adapter.lora.alpha"] / down.shape[0] * (up @ down)
        np.testing.assert_allclose(delta, adapter.delta().detach().numpy(), rtol=1e-4, atol=1e-6)


MISTAKES = {  # base, targets and settings of the adapter, words; what the line says
    "architecture": ("gpt2", ["c_attn"], {}, [], "--format: gguf has no layout for gpt2 here"),
    "dora": ("llama", ["q_proj"], {"use_dora": True}, [], "gguf has no DoRA"),
    "saved": (
        "llama",
        ["q_proj"],
        {"modules_to_save": ["norm"]},
        [],
        "gguf has no modules_to_save (norm)",
    ),
    "tied": ("tied", ["embed_tokens"], {}, [], "no adapter of model.embed_tokens alone"),
    "layout": (
        "llama",
        ["q_proj"],
        {},
        ["--layout", "checkpoint"],
        "--layout cannot act with --merge or another --format than peft",
    ),
    "dtype": ("llama", ["q_proj"], {}, ["--merge", "--dtype", "float64"], "--dtype: llama.cpp"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_llama_cpp_lacks_is_one_line(mistake: str, bases: Any, tmp_path: Path) -> None:
    name, targets, settings, words, said = MISTAKES[mistake]
    base = bases(name)
    model = attach_random(loaded(base), LoraConfig(r=2, target_modules=targets, **settings))
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(base))
    argv = ["--adapter", str(tmp_path / "adapter"), "--to", str(tmp_path / "to")]
    assert said in refusal(main, [*argv, "--format", "gguf", *words])
    assert not (tmp_path / "to").exists()


def test_a_modelfile_writes_chats_as_the_tokenizer_does(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = made_by_peft(base, Case("llama", ["q_proj"]), tmp_path / "adapter")
    words = ["--adapter", str(adapter), "--to", str(tmp_path / "to"), "--format", "gguf"]
    assert main(words) == 0
    text = (tmp_path / "to/Modelfile").read_text()
    assert text.startswith(f"FROM {base}\nADAPTER ./adapter.gguf\nTEMPLATE ")
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')
    assert "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>" in text


DEFAULT = (  # as SmolLM2 has it
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}"
)
BOS_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "starts", "system"),
    [
        (CHATML, "{{ range .Messages }}<|im_start|>", None),
        (DEFAULT + CHATML, "{{ range .Messages }}<|im_start|>", "Be kind."),
        (BOS_LLAMA3, "{{ range .Messages }}<|start_header_id|>", None),
        (CHATML.replace("im_start", "turn"), None, None),
        ("{{ raise_exception('no') }}", None, None),
    ],
)
def test_ollama_s_template(template: str, starts: str | None, system: str | None) -> None:
    made = tokenizer()
    made.chat_template, made.bos_token = template, "<|im_start|>"
    text = modelfile("base.gguf", None, made, [])
    assert text.startswith("FROM base.gguf\n")
    assert (f'TEMPLATE """{starts}' in text) == (starts is not None)
    assert ("# The chat template has no known twin" in text) == (starts is None)
    assert ("SYSTEM" in text) == (system is not None)
    assert system is None or f'SYSTEM """{system}"""' in text


@pytest.mark.parametrize(
    ("settings", "keys", "said"),
    [
        ({"r": 16}, ["a.q_proj.lora_A.weight"], None),
        ({"r": 24}, ["a.q_proj.lora_A.weight"], "--max-lora-rank 32 or more"),
        ({"r": 600}, ["a.q_proj.lora_A.weight"], "r up to 512"),
        ({"r": 8, "use_dora": True}, [], "cannot load this adapter: use_dora"),
        ({"r": 8, "modules_to_save": ["norm"]}, [], "modules_to_save (norm)"),
        ({"r": 8, "rank_pattern": {"q": 4}}, [], "rank_pattern, since"),
        ({"r": 8}, ["a.lm_head.lora_A.weight"], "adapters of lm_head"),
    ],
)
def test_what_servers_cannot_load(settings: Any, keys: list[str], said: str | None) -> None:
    lines = list(serving_lines(settings, keys))
    assert lines == [] if said is None else (len(lines) == 1 and said in lines[0])


def test_a_run_s_adapter_finds_the_gguf_of_its_base(tmp_path: Path) -> None:
    file = tiny_llama(tmp_path / "base.gguf")
    argv = command(file, tmp_path, model__cache_dir=str(tmp_path / "cache"), train__max_steps=1)
    assert train([*argv, "--adapter.target_modules", "[q_proj]"]) == 0
    words = ["--adapter", str(tmp_path / "run/adapter"), "--format", "gguf"]
    assert main([*words, "--to", str(tmp_path / "to")]) == 0
    assert (tmp_path / "to/Modelfile").read_text().startswith(f"FROM {file}\n")
    assert main([*words, "--merge", "--to", str(tmp_path / "merged")]) == 0
    before, _ = read(file)
    after, _ = read(tmp_path / "merged/model.gguf")
    assert after["tokenizer.ggml.pre"] == before["tokenizer.ggml.pre"] == "smollm"
    file.unlink()  # the converted directory is enough
    assert main([*words, "--to", str(tmp_path / "without")]) == 0
