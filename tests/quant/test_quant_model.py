"""A real model, SmolLM2-135M, packed: its loss on three texts, and the bytes of its weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import real_file

from dlora.base.model import find_base
from dlora.quant.linear import is_packed
from dlora.sharding.engines.protocol import build_engine
from dlora.sharding.engines.storage import held_bytes
from dlora.sharding.topology import Topology, resolve_placement

ROOT = Path(__file__).parents[2]
TEXTS = [
    "The old bridge had been closed since the spring, and nobody in the village could say when it "
    "would open again. Every morning the baker drove the long way round through the hills, an hour "
    "there and an hour back, and every morning he complained about it to whoever would listen. His "
    "daughter, who was nine, had decided to build a boat.",
    "The water cycle describes how water moves on, above and below the surface of the Earth. Heat "
    "from the sun makes water evaporate from oceans, lakes and rivers. The vapour rises, cools and "
    "condenses into clouds, and falls again as rain or snow. Some of it runs off into streams, and "
    "some of it soaks into the ground, where plants take it up or it fills the aquifers.",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n    a, b = 0, 1\n"
    "    for _ in range(n):\n        a, b = b, a + b\n    return a\n\n\n"
    "def factorial(n):\n    \"\"\"Return n!.\"\"\"\n    result = 1\n"
    "    for i in range(2, n + 1):\n        result *= i\n    return result\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Any:
    """base(quantization): the model's base in float32, of its conversion to bfloat16."""
    source = find_base(str(real_file()), cache_dir=str(ROOT / "models/converted")).source
    return lambda quantization: find_base(source, dtype="float32", quantization=quantization)


def loaded(base: Any) -> Any:
    topology = Topology.current()
    engine = build_engine(resolve_placement("fsdp2", "none", topology), topology)
    return base.load(engine, torch.device("cpu"))


def losses(model: Any, tokenizer: Any) -> torch.Tensor:
    """Mean cross entropy of each text."""
    found = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found.append(model(input_ids=ids, labels=ids).loss)
    return torch.stack(found)


@pytest.mark.timeout(600)
def test_losses_are_near_those_of_float32(base: Any) -> None:
    tokenizer = base("none").tokenizer()
    wanted = losses(loaded(base("none")), tokenizer)
    told = {}
    for quantization, bound in {"nf4": 0.40, "nf4-dq": 0.40, "int8": 0.05, "fp8": 0.05}.items():
        model = loaded(base(quantization))
        got = losses(model, tokenizer)
        told[quantization] = [round(float(loss), 3) for loss in got]
        assert abs(float(got.mean() - wanted.mean())) <= bound, told
        packed = [module for module in model.modules() if is_packed(module)]
        weights = sum(m.in_features * m.out_features for m in packed)
        nbytes = sum(p.nbytes for m in packed for p in m.parameters(recurse=False))
        assert len(packed) == 210 and weights == 106_168_320
        assert nbytes <= (1.01 if quantization in ("int8", "fp8") else 0.54) * weights
        assert held_bytes(model) == nbytes + 4 * (134_515_008 - weights)
    print([round(float(loss), 3) for loss in wanted], told)
