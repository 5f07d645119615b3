"""A tiny configuration of any architecture: the class's own defaults with every size made small.

Sizes are known by their names (`RULES`), nested configurations are made small too, and of lists
with an entry for each layer one layer of each kind is taken. So a class of a newer transformers
needs nothing here; `EXCEPTIONS` has those whose sizes depend on one another in their own way.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

HIDDEN, INNER, HEADS, KEY_VALUE_HEADS, HEAD_DIM = 64, 128, 4, 2, 16
VOCABULARY = 320  # the byte tokenizer's 259 tokens, then room for the tokens of images and the like
TOKENS = {"pad_token_id": 258, "eos_token_id": 257, "bos_token_id": 256}  # that tokenizer's
FIRST_SPECIAL = 260
POSITIONS = 512  # some count positions from the padding token's id on

# Ends of a field's name, as expressions, and its size; the first that matches counts.
RULES: list[tuple[int, str]] = [
    (0, "num_(nextn_predict|mtp)_layers num_kv_shared_layers"),
    (1, "n_group topk_group num_expert_groups? n_shared_experts num_shared_experts"),
    (1, "first_k_dense_replace num_(first_)?dense_layers moe_layer_start_index"),
    (VOCABULARY, "vocab_size(_per_layer_input)? n_words"),
    (2 * HIDDEN // HEAD_DIM, "mamba_(num|n)_heads"),
    (KEY_VALUE_HEADS, "(num_key_value|num_kv|global_key_value|linear_num_key|kv_n)_heads"),
    (KEY_VALUE_HEADS, "n_head_kv num_attention_groups"),
    (HEADS, "(attention|num|query|n|value)_heads n_head"),
    (2, "(num_hidden|num|n|encoder|decoder)_layers? depth num_blocks"),
    (64, "lora_rank hc_lowrank"),
    (8, "per_layer_input index_head_dim rotary_dim rope_head_dim"),
    (HEAD_DIM, "head_(dim|size) dim_head d_head d_kv kv_channels attention_key_channels"),
    (
        HIDDEN,
        "hidden_(size|dim)(_global)? d_model n_embd emb(ed)?_dim embedding_size embed_proj_dim",
    ),
    (HIDDEN, "proj(ection)?_dims? model_dim lru_width out_dim adapter_in_dim decoder_input_dim"),
    (INNER, "intermediate_size ffn_dim dim_ff n_inner d_ff inner_dim mlp_dim ffn_hidden_size dff"),
    (INNER, "feed_forward_size"),
    (2, "experts_per_tok(en)? moe_topk moe_k top_k_experts moe_top_k selected_experts router_topk"),
    (4, "experts moe_num_experts zero_expert_num"),
    (16, "sliding_window window_size attention_chunk_size local_window attention_window_len"),
    (POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len context_length seq_length"),
    (POSITIONS, "(target|source)_positions position_embedding_size num_position_embeddings"),
    (16, "d_state state_size state_dim"),
    (2, "n_groups"),
    (8, "index_topk indexer_budget"),
    (16, "(?<!shared_)chunk_size"),
    (128, "ngram_vocab_size_base hash_byte_group_vocab num_centroids"),
    (28, "image_size"),
    (14, "patch_size"),
]
# Sizes without which a class whose default leaves them open cannot be built.
OPEN = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "num_experts": 4,
    "n_shared_experts": 1,
}


def tiny(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A small configuration of the class.

    Raises:
        Exception: whatever the class raises for it.
    """
    return _shrunk(config_class())


def _shrunk(default: PreTrainedConfig) -> PreTrainedConfig:
    kind = type(default)
    if hasattr(default, "allow_global_per_layer_attribute_access"):
        default.allow_global_per_layer_attribute_access = True
    given = dict(_fields(default))
    given |= _layers(default, given)
    given |= EXCEPTIONS.get(kind.model_type, {})
    return kind(**given)


def _fields(default: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    special = iter(range(FIRST_SPECIAL, VOCABULARY))
    for field in dataclasses.fields(default):
        name, value = field.name, getattr(default, field.name, None)
        if isinstance(value, PreTrainedConfig):
            yield name, _shrunk(value)
        elif name == "is_decoder":
            yield name, True
        elif value is None and name in OPEN:
            yield name, OPEN[name]
        elif field.default is None or not isinstance(value, bool | int | float | str):
            continue  # made of others
        elif isinstance(field.default, str) and not isinstance(value, str):
            continue  # "auto": likewise
        elif re.fullmatch(r".*token_(id|index)", name) and isinstance(value, int):
            yield name, TOKENS.get(name) or next(special)
        elif type(value) is int and (small := size(name)) is not None:
            yield name, min(value, small)
        elif value != field.default and type(value) is type(field.default):
            yield name, value  # an outer configuration's choice


def size(name: str) -> int | None:
    """Of a field of that name; None where it is no size."""
    found = (small for small, ends in RULES for end in ends.split() if re.search(f"({end})$", name))
    return next(found, None)


def _layers(default: PreTrainedConfig, given: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind, where the configuration lists its layers; heads that fit."""
    found: dict[str, Any] = {}
    heads, shared = (
        getattr(default, f"num_{name}_heads", None) for name in ("attention", "key_value")
    )
    if isinstance(shared, int) and shared == heads and "num_key_value_heads" in given:
        found["num_key_value_heads"] = HEADS
    count = getattr(default, "num_hidden_layers", None)
    names = {field.name for field in dataclasses.fields(default)}
    listed = {
        name: value
        for name, value in vars(default).items()
        if isinstance(value, list) and len(value) == count and name in names
    }
    if not listed:
        return found
    kinds = list(map(str, zip(*listed.values(), strict=True)))
    first = sorted(kinds.index(kind) for kind in set(kinds))
    first = (first * 2)[:2] if len(first) < 2 else first
    taken = {name: [value[i] for i in first] for name, value in listed.items()}
    return found | taken | {"num_hidden_layers": len(first)}


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SECTIONS = {"rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}}  # of half a head
_FEWER = {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 64,
        "swa_kv_lora_rank": 64,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    # Lists of layers by number: each layer would be of a kind of its own.
    "llama4_text": {
        "intermediate_size_mlp": INNER,
        "num_hidden_layers": 2,
        "moe_layers": [1],
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "mistral_large4_text": {
        "num_hidden_layers": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["indexed_attention"] * 3,
        "indexer_types": ["full"] * 3,
        "no_rope_layers": [1, 1, 0],
        "kv_source_layers": [0, 1, 2],
    },
    "gemma3n_text": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": [INNER, INNER],
        "activation_sparsity_pattern": [0.5, 0.0],
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}},
    "gemma4_text": {"global_head_dim": HEAD_DIM},
    "gemma4_unified_text": {"global_head_dim": HEAD_DIM},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "glm4v_text": _SECTIONS,
    "glm4v_moe_text": _FEWER,
    "glm_ocr_text": _SECTIONS,
    "paddleocr_vl_text": _SECTIONS,
    "qwen2_5_omni_text": _SECTIONS,
    "qwen2_5_vl_text": _SECTIONS,
    "qwen2_vl_text": _SECTIONS,
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 32},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [16, 48],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
    },
    "xlstm": {"num_heads": 2, "hidden_size": 128},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
}
