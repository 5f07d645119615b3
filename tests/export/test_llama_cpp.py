"""llama.cpp itself, on what export writes: the same greedy tokens as transformers has."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import attach_random
from gguf_files import convert, real_file
from partners import told_by
from tiny import whole
from transformers import AutoTokenizer

from dlora import LoraConfig, save_adapter
from dlora.export.command import main

PROMPTS = ["def json.loads(s)", "The capital of France is", "Once upon a time, größer"]
NEW = 24
ANSWER = """
import json, sys
from llama_cpp import Llama
model, adapter, prompts = sys.argv[1], sys.argv[2] or None, json.loads(sys.argv[3])
llama = Llama(model, n_ctx=256, n_threads=1, lora_path=adapter, verbose=False)
found = []
for prompt in prompts:
    read = llama.tokenize(prompt.encode(), add_bos=False, special=True)
    made = []
    for token in llama.generate(read, temp=0.0, repeat_penalty=1.0):
        made.append(token)
        if len(made) == int(sys.argv[4]):
            break
    found.append([read, made])
print(json.dumps(found))
"""


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    """SmolLM2 in float32: with the adapter beside the base, and merged."""

    file = real_file()
    base, _ = convert(file, tmp_path / "cache")
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, rank_pattern={"k_proj": 3})
    model = attach_random(whole(base), config, std=0.03)
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(base))
    for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
        torch.nn.init.zeros_(parameter)
    save_adapter(model, tmp_path / "nothing", base_model_name_or_path=str(base))

    def export(adapter: str, to: str, *words: str) -> Path:
        argv = ["--adapter", str(tmp_path / adapter), "--to", str(tmp_path / to), *words]
        assert main(argv) == 0
        return tmp_path / to

    merge = ("--merge", "--dtype", "float32")
    plain = export("adapter", "merged", *merge)
    wanted = answers(whole(plain), base)
    assert wanted != answers(whole(base), base)  # the adapter changes what is said
    gguf = ("--format", "gguf")
    files: dict[str, tuple[Path, Any]] = {
        "merged": (export("adapter", "a", *gguf, *merge) / "model.gguf", ""),
        "from a .gguf": (
            export("adapter", "b", *gguf, *merge, "--base", str(file)) / "model.gguf",
            "",
        ),
        "beside": (
            export("nothing", "c", *gguf, *merge) / "model.gguf",
            export("adapter", "d", *gguf) / "adapter.gguf",
        ),
    }
    for name, (path, adapter) in files.items():
        argv = (str(path), str(adapter), json.dumps(PROMPTS), str(NEW))
        assert told_by(ANSWER, *argv, cwd=tmp_path) == wanted, name


def answers(model: Any, base: Path) -> list[list[list[int]]]:
    """[tokens of the prompt, greedy tokens] for each prompt, by transformers."""
    tokenizer, found = AutoTokenizer.from_pretrained(base), []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        made = model.generate(
            ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        found.append([ids[0].tolist(), made[0, ids.shape[1] :].tolist()])
    return found
