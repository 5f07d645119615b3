"""Invariant 7: while it reads a base, a rank holds its share, a layer, and little else."""

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import Pool
from sampling import full
from tiny import save_filled

from dlora.base.model import find_base
from dlora.base.quantize import quantize
from dlora.runtime.memory import trim
from dlora.sharding.engines.protocol import build_engine
from dlora.sharding.topology import Topology, resolve_placement

SLACK = 200e6
SAMPLE_SECONDS = 0.005


def save_llama(directory: Path, dtype: torch.dtype, quantization: str) -> tuple[int, int]:
    """A Llama of 187 M parameters; (bytes of all in bfloat16 or packed, bytes of its largest layer
    before it is packed).
    """
    sizes = {"vocab_size": 16000, "intermediate_size": 2816, "num_hidden_layers": 12}
    model = save_filled(directory, dtype, 0.01, **sizes)
    layers = [*model.model.layers, model.model.embed_tokens, model.lm_head]
    sizes = [2 * sum(p.numel() for p in layer.parameters()) for layer in layers]
    model.to(torch.bfloat16)
    if quantization != "none":
        quantize(model, quantization)
    return sum(p.nbytes for p in model.parameters()), max(sizes)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def most_held_while_loading(path: str, name: str, quantization: str) -> tuple[int, int]:
    """Anonymous bytes above those after all imports: (at most while loading, when it is done)."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import dlora.train  # noqa: F401

    topology = Topology.current()
    engine = build_engine(resolve_placement(name, "world", topology), topology)
    gc.collect()
    trim()  # what is free already would be used while the base is read, and hide its bytes
    before, most, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(SAMPLE_SECONDS):
            most = max(most, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    base = find_base(path, dtype="bfloat16", quantization=quantization)
    model = base.load(engine, torch.device("cpu"))
    done.set()
    watcher.join()
    after = anonymous_bytes()
    del model
    return most - before, after - before


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Two ranks whose memory holds nothing of other files' tests; what a case leaves is trimmed."""
    pool = Pool(2, tmp_path_factory.mktemp("ranks"), fresh=True)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("engine", "stored", "quantization"),
    [
        ("fsdp2", "bfloat16", "none"),
        ("zero3", "float32", "nf4-dq"),
        # 20 s each: both engines, both stored types, packed and plain are in the others
        full("fsdp2", "float32", "none"),
        full("zero3", "float32", "none"),
        full("fsdp2", "float32", "nf4"),
        full("zero3", "bfloat16", "nf4-dq"),
        full("fsdp2", "bfloat16", "int8"),
    ],
)
def test_no_rank_ever_holds_the_whole_base(
    fresh: Pool, tmp_path: Path, engine: str, stored: str, quantization: str
) -> None:
    """promise 1.8: a rank reads its share only, and packs it while it reads."""
    total, largest_layer = save_llama(tmp_path, getattr(torch, stored), quantization)
    results = fresh.run(most_held_while_loading, str(tmp_path), engine, quantization)
    print(engine, stored, quantization, total / 1e6, largest_layer / 1e6, results)
    for most, after in results:
        assert most <= total / 2 + largest_layer + SLACK
        assert total / 2 <= after <= total / 2 + SLACK / 4
