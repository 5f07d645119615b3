"""Llama shapes with adapters, planned from a config file alone."""

import functools
import json
import tempfile
from pathlib import Path

from dlora.base.model import find_base
from dlora.config.load import OptimizerConfig
from dlora.config.recompute import Recompute
from dlora.lora.attach import attach, trainable_parameters
from dlora.lora.config import LoraConfig
from dlora.plan.plan import Plan, Subject
from dlora.plan.workload import Workload
from dlora.sharding.topology import Topology, resolve_placement

R, BF16, FLOAT32 = 16, 2, 4
# hidden, layers, ffn, heads, key-value heads, vocabulary
SHAPES = {
    "small": (2048, 8, 5504, 16, 16, 32000),
    "7B": (4096, 32, 11008, 32, 32, 32000),
    "70B": (8192, 80, 28672, 64, 8, 128256),
    "405B": (16384, 126, 53248, 128, 8, 128256),
}


def saved_config(name: str, directory: Path) -> str:
    """A directory with nothing but config.json."""
    hidden, layers, ffn, heads, kv, vocabulary = SHAPES[name]
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(settings))
    return str(directory)


@functools.cache
def subject(name: str, checkpointing: bool = False, quantization: str = "none") -> Subject:
    """The shape with adapters, and a step of two micro-batches of one sequence."""
    with tempfile.TemporaryDirectory() as directory:
        base = find_base(saved_config(name, Path(directory)), quantization=quantization)
        skeleton = base.skeleton()
    base.pack(skeleton)
    attach(skeleton, LoraConfig(r=R))
    workload = Workload(
        1,
        256,
        micro_batches=2,
        optimizer=OptimizerConfig(),
        checkpointing=Recompute(int(checkpointing)),
    )
    return Subject(skeleton, trainable_parameters(skeleton), workload, device="cuda")


def planned(name: str, nodes: int, per_node: int, base: str, engine: str = "fsdp2") -> Plan:
    topology = Topology(0, nodes * per_node, per_node)
    return subject(name).plan(resolve_placement(engine, base, topology), topology)


def block_shapes(name: str) -> list[tuple[int, int]]:
    hidden, _, ffn, heads, kv, _ = SHAPES[name]
    narrow = hidden // heads * kv
    attention = [(hidden, hidden), (narrow, hidden), (narrow, hidden), (hidden, hidden)]
    return [*attention, (ffn, hidden), (ffn, hidden), (hidden, ffn)]
