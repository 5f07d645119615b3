"""One matrix at a time: what composing takes beside the adapters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
M, N, R = 300_000, 128, 2
MATRIX = M * N * 4  # more than the margin, so that a second one is seen
MARGIN = 100_000_000
MEASURED = """
import sys
from dlora.library.compose import main
from dlora.runtime.memory import MemoryMeter

meter = MemoryMeter()
assert main(sys.argv[1:]) == 0
print(meter.peak())
"""


@pytest.mark.parametrize("method", ["svd", "ties_svd"])
def test_peak_memory(method, tmp_path):
    adapters = [save_large(tmp_path / str(seed), seed) for seed in range(2)]
    words = ["--adapters", *(f"{adapter}=0.5" for adapter in adapters), "--method", method]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *words, "--to", str(tmp_path / "made")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    stored = sum((adapter / "adapter_model.safetensors").stat().st_size for adapter in adapters)
    peak = int(done.stdout.split()[-1])
    assert peak < (MATRIX if method != "svd" else 0) + stored + MARGIN


def save_large(directory: Path, seed: int) -> Path:
    """An adapter of a matrix [M, N]."""
    torch.manual_seed(seed)
    directory.mkdir()
    tensors = {"A": torch.randn(R, N), "B": torch.randn(M, R)}
    tensors = {f"base_model.model.large.lora_{x}.weight": t for x, t in tensors.items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": R, "lora_alpha": R, "target_modules": ["large"]}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory
