"""What an extraction holds in memory: one matrix with its decomposition, and the adapter."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import save_filled

MEASURED = """
import sys, threading
import torch, transformers
from dlora.library.extract import main

def anonymous():
    with open("/proc/self/smaps_rollup") as rollup:
        fields = (line.split() for line in rollup)
        return sum(int(f[1]) << 10 for f in fields if f[0] == "Anonymous:")

words = sys.argv[1:]
# What is imported and set up once:
main(["--base", "small", "--tuned", "small tuned", "--to", "s", *words])
before = highest = anonymous()
done = threading.Event()

def watch():
    global highest
    while not done.wait(0.002):
        highest = max(highest, anonymous())

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
main(["--base", "base", "--tuned", "tuned", "--to", "adapter", *words])
done.set()
watcher.join()
print("PEAK", highest - before)
"""


def tune(base: Path, to: Path) -> None:
    """Half of each row of the embeddings is moved."""
    to.mkdir()
    shutil.copy(base / "config.json", to)
    tensors = load_file(base / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    table[:, : table.shape[1] // 2] += 0.5
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})


def test_two_models_of_260_mb_take_the_memory_of_a_matrix(tmp_path: Path) -> None:
    sizes = {"vocab_size": 8192, "intermediate_size": 4096, "num_hidden_layers": 6}
    skeleton = save_filled(tmp_path / "base", torch.bfloat16, 0.5, **sizes)
    assert sum(parameter.nbytes for parameter in skeleton.parameters()) > 2.3e8
    tune(tmp_path / "base", tmp_path / "tuned")
    save_filled(tmp_path / "small", torch.bfloat16, 0.5)
    tune(tmp_path / "small", tmp_path / "small tuned")
    words = ["--rank", "8"]
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "model.embed_tokens: rank 1 of 1024, energy 1, changed by" in ended.stdout
    D = 8192 * 1024 * 4  # in float32
    squares = 4 * 1024**2 * 8  # D·Dᵀ, its eigenvectors, and what LAPACK works in
    peak = int(ended.stdout.rpartition("PEAK")[2])
    assert D < peak < D + squares + 50e6, f"{peak / 1e6:.0f} MB"
    shutil.rmtree(tmp_path)  # pytest would keep 500 MB of the last three sessions each
