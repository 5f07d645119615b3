"""A merged model as one GGUF file, for llama.cpp, Ollama and LM Studio.

    from a .gguf      its metadata and its tokenizer, copied; its tensors with W0 + ΔW
    from a directory  what llama.cpp's converter would write

Matrices in the dtype of the merge, vectors in float32. One tensor is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from dlora.base.gguf_reader import GGUFReader
from dlora.errors import UsageError
from dlora.export.gguf_layout import Layout
from dlora.export.gguf_tokenizer import add_tokenizer
from dlora.export.merged_model import MergedModel
from dlora.io.safetensors import FLOATS, NewTensor
from dlora.metrics.progress import CopyDisplay
from dlora.runtime.memory import trim

MODEL_FILE = "model.gguf"
_TYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}
_FILE_TYPES = {
    torch.float32: gguf.LlamaFileType.ALL_F32,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
}
_OWN = {"general.architecture", "general.type", "general.file_type", "general.quantization_version"}
_COPIED = ("rope_freqs.weight",)  # tensors of a .gguf that are no weights of a model


def write_model(
    merged: MergedModel,
    config: Any,
    path: Path,
    *,
    tokenizer: Any,
    origin: Path | None,
    name: str,
    display: CopyDisplay,
) -> None:
    """Write a merged model to `path`.

    Args:
        config: of the merged model.
        tokenizer: with the chat template of the training.
        origin: the `.gguf` that the base was converted from; None: it was none.
        name: for `general.name`.

    Raises:
        UsageError: llama.cpp has no such model, or no place for something in it.
    """
    layout = Layout.of(config)
    tensors = _named(merged, layout, tied=config.tie_word_embeddings)
    # In the dtype of most bytes, which is that of the matrices.
    dtype = FLOATS[max(tensors.values(), key=lambda t: t.nbytes).dtype]
    if dtype not in _TYPES:
        raise UsageError("--dtype: llama.cpp computes with float32, float16 and bfloat16")
    writer = gguf.GGUFWriter(path, layout.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(_FILE_TYPES[dtype])
    if origin is None:
        writer.add_name(name)
        _add_settings(writer, config)
        add_tokenizer(writer, tokenizer, config.vocab_size)
    else:
        _copy_metadata(writer, origin, layout.architecture, tokenizer)
    extra = _copied(origin) if origin is not None else _frequencies(config)
    for place, array in extra.items():
        writer.add_tensor_info(place, array.shape, array.dtype, array.nbytes)
    for place, tensor in tensors.items():
        kind = _kind(tensor)
        shape = (*tensor.shape[:-1], tensor.shape[-1] * _size(kind))
        writer.add_tensor_info(place, shape, np.dtype(np.uint8), math.prod(shape), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in extra.values():
        writer.write_tensor_data(array)
    with torch.no_grad():
        for tensor in tensors.values():
            writer.write_tensor_data(_bytes(tensor, layout, display.advance))
            trim()
    writer.close()
    display.finish(path.name)


def _named(merged: MergedModel, layout: Layout, *, tied: bool) -> dict[str, NewTensor]:
    """The tensors by llama.cpp's names; a head that is the embedding is not written again."""
    named = {}
    for tensor in (tensor for shard in merged.shards for tensor in shard):
        if tensor.key == "lm_head.weight" and tied:
            continue
        if tensor.key.endswith("rotary_emb.inv_freq"):
            continue  # of older files; computed
        if tensor.dtype not in FLOATS:
            raise UsageError(f"--format: gguf: {tensor.key} is {tensor.dtype}, not floating-point")
        named[layout.name(tensor.key)] = tensor
    return named


def _kind(tensor: NewTensor) -> gguf.GGMLQuantizationType:
    """Vectors are float32, as llama.cpp adds and multiplies them."""
    if len(tensor.shape) < 2:
        return gguf.GGMLQuantizationType.F32
    return _TYPES[FLOATS[tensor.dtype]]


def _size(kind: gguf.GGMLQuantizationType) -> int:
    return gguf.GGML_QUANT_SIZES[kind][1]


def _bytes(tensor: NewTensor, layout: Layout, written: Callable[[int], None]) -> np.ndarray:
    """A tensor's bytes in the file, [.., row bytes]."""
    content = bytearray()
    for block in tensor.blocks():
        content += block
        written(len(block))
    whole: Tensor = torch.frombuffer(content, dtype=FLOATS[tensor.dtype]).view(tensor.shape)
    whole = layout.permuted(tensor.key, whole)
    if len(tensor.shape) < 2:
        whole = whole.float()
    return whole.contiguous().view(torch.uint8).numpy()


def _add_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    """The numbers of a model, from its config.json."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind not in ("default", "llama3"):
        raise UsageError(f"--format: gguf: rope_type {kind} of the base is not written here")
    if config.hidden_act != "silu":
        raise UsageError(f"--format: gguf: llama.cpp has silu here, the base {config.hidden_act}")
    if getattr(config, "mlp_bias", False) or getattr(config, "use_sliding_window", False):
        raise UsageError("--format: gguf: llama.cpp has no mlp_bias and no use_sliding_window here")


def _frequencies(config: Any) -> dict[str, np.ndarray]:
    """Llama 3's factors of the rotary frequencies, of which llama.cpp makes a tensor.

    transformers scales the frequencies themselves; a factor is the unscaled one over the scaled.
    """
    if config.rope_parameters.get("rope_type", "default") != "llama3":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head = 2 * scaled.numel()
    powers = torch.arange(0, head, 2, dtype=torch.float32) / head
    plain = 1.0 / config.rope_parameters["rope_theta"] ** powers
    return {"rope_freqs.weight": (plain / scaled).numpy()}


def _copy_metadata(
    writer: gguf.GGUFWriter, origin: Path, architecture: str, tokenizer: Any
) -> None:
    """The metadata of a `.gguf`, with the chat template of the training in place of its own."""
    reader = GGUFReader(origin)
    found = reader.fields["general.architecture"].contents()
    if found != architecture:
        raise UsageError(f"--format: gguf: {origin} is {found}, and the base {architecture}")
    template = gguf.Keys.Tokenizer.CHAT_TEMPLATE
    for field in reader.fields.values():
        if field.name in _OWN or field.name.startswith(("GGUF.", "split.")):
            continue
        if field.name == template and tokenizer is not None:
            continue
        kind, *below = field.types
        if (value := field.contents()) is not None:
            writer.add_key_value(field.name, value, kind, below[-1] if below else None)
    if tokenizer is not None and isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _copied(origin: Path) -> dict[str, np.ndarray]:
    """Tensors that are no weights, from a `.gguf`."""
    tensors = GGUFReader(origin).tensors
    return {t.name: np.array(t.data) for t in tensors if t.name in _COPIED}
