"""An adapter as llama.cpp loads it (`--lora adapter.gguf`; Ollama's `ADAPTER`).

    general.type = adapter    adapter.type = lora    adapter.lora.alpha
    blk.0.attn_q.weight.lora_a [r, in]    blk.0.attn_q.weight.lora_b [out, r]      float32

llama.cpp scales every module by alpha / r, with one alpha for all; where PEFT's file says another
scale for a module (rank_pattern, alpha_pattern, use_rslora) the rest of it goes into B.

Source: llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from dlora.adapters.peft_names import PREFIX
from dlora.adapters.save_load import read_config
from dlora.adapters.write import WEIGHTS
from dlora.errors import UsageError
from dlora.export.gguf_layout import Layout
from dlora.io.safetensors import stored_tensors
from dlora.lora.config import LoraConfig

ADAPTER_FILE = "adapter.gguf"


def write_adapter(peft: Path, path: Path, config: Any, name: str) -> None:
    """Write the adapter of a directory in PEFT's format to `path`.

    Args:
        config: of the base.
        name: for `general.name`.

    Raises:
        UsageError: llama.cpp has no place for something in it; the message names it.
    """
    layout, lora = Layout.of(config), read_config(peft)
    stored = {key: tensor.rows() for key, tensor in stored_tensors(peft / WEIGHTS).items()}
    pairs = _pairs(lora, stored, config.tie_word_embeddings)
    writer = gguf.GGUFWriter(path, layout.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(name)
    alpha = float(lora.lora_alpha) or 1.0
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for module, (down, up) in pairs.items():
        place = layout.name(f"{module}.weight")
        r = up.shape[1]
        rest = lora.scaling_for(module) * r / alpha
        if not abs(rest - 1) < 1e-12:
            up = (up.double() * rest).float()
        if place == "token_embd.weight":
            down = down.T  # llama.cpp looks its rows up by token
        tensors = {"lora_a": down, "lora_b": layout.permuted(module, up)}
        for word, tensor in tensors.items():
            writer.add_tensor(f"{place}.{word}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _pairs(
    lora: LoraConfig, stored: Mapping[str, Tensor], tied: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: (A, B)} of a plain LoRA."""
    merge = "; export with --merge"
    if lora.use_dora:
        raise UsageError(f"--format: gguf has no DoRA{merge}")
    if lora.modules_to_save:
        saved = ", ".join(lora.modules_to_save)
        raise UsageError(f"--format: gguf has no modules_to_save ({saved}){merge}")
    if lora.target_parameters:
        raise UsageError(f"--format: gguf has no adapters of stacked parameters here{merge}")
    pairs = {}
    for key, up in stored.items():
        module, word, rest = key.removeprefix(PREFIX).rpartition(".lora_")
        if not word or not rest.startswith(("B", "embedding_B")):
            continue
        if tied and module.rpartition(".")[2] in ("embed_tokens", "lm_head"):
            raise UsageError(
                f"--format: gguf has one tensor for the embedding and the head of this base, so no "
                f"adapter of {module} alone{merge}"
            )
        down = stored[key.replace("lora_B", "lora_A").replace("embedding_B", "embedding_A")]
        pairs[module] = (down.to(torch.float32), up.to(torch.float32))
    return pairs
