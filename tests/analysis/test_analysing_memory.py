"""One matrix at a time: what an analysis takes beside the adapters, over its imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
HIDDEN, INNER, R = 1536, 20480, 8  # a short side for the Krylov space
MATRIX = HIDDEN * INNER * 4  # more than the margin, so that a second one is seen
MARGIN = 100_000_000
MEASURED = """
import sys
import transformers.models.llama.modeling_llama  # what the command would import later
from matplotlib.figure import Figure
from dlora.analysis.command import main
from dlora.runtime.memory import MemoryMeter

meter = MemoryMeter()
assert main(sys.argv[1:]) == 0
print(meter.peak())
"""


def test_peak_memory(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=1,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path / "base")
    draw = torch.Generator().manual_seed(0)
    falling = 1 / torch.arange(1, INNER + 1)
    weights = {}
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        rows = torch.randn(min(shape[0], 512), *shape[1:], generator=draw)
        rows = (rows * falling[: shape[-1]] if rows.ndim == 2 else rows).bfloat16()
        weights[name] = rows.repeat(shape[0] // len(rows), *[1] * (len(shape) - 1))
    save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    del weights
    stored = sum(save_random(tmp_path, seed) for seed in (1, 2))
    words = ["--adapter", "1", "--against", "2", "--to", "to"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    assert MATRIX < peak < MATRIX + stored + MARGIN, f"{peak / 1e6:.0f} MB"


def save_random(root: Path, seed: int) -> int:
    """An adapter of the MLP; the bytes of its tensors."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, m, n in (("up_proj", INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
        key = f"base_model.model.model.layers.0.mlp.{name}.lora_"
        tensors[f"{key}A.weight"] = torch.randn(R, n, generator=draw)
        tensors[f"{key}B.weight"] = torch.randn(m, R, generator=draw)
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(root / "base"),
        "r": R,
        "lora_alpha": R,
        "target_modules": ["up_proj", "down_proj"],
    }
    directory = root / str(seed)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return sum(tensor.nbytes for tensor in tensors.values())
