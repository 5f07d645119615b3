"""A tiny random model of many of transformers' architectures, by its `model_type`."""

from pathlib import Path
from typing import Any

import torch
from tiny import VOCABULARY, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

IDS = torch.arange(3, 27).view(2, 12)
# Each configuration takes those of the keys that it has.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "pad_token_id": 0,
    "eos_token_id": 2,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "dff", "d_ff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("attention_heads", "num_key_value_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("head_dim", "global_head_dim", "rotary_dim", "kv_channels"), 8),
    **dict.fromkeys(("n_positions", "n_ctx", "max_position_embeddings", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_group", "n_groups", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("mamba_n_groups", "first_k_dense_replace"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "mamba_d_head"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(
        ("mamba_d_state", "state_size", "ssm_state_size", "hidden_size_per_layer_input"), 8
    ),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_head_dim", "attention_window_size", "chunk_size"), 16),
    **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout"), 0.0),
    **dict.fromkeys(("dropout", "activation_dropout", "hidden_dropout"), 0.0),
    "mamba_d_ssm": 64,
    "mamba_expand": 2,
    "expansion_ratio": 2,
}
_EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe", "mlp"]},
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "n_mamba_heads": 2,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "num_mem_blocks": 1,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
}


def tiny_config(kind: str, **extra: Any) -> Any:
    """The configuration; one of several parts gets the same sizes in each of them."""
    default = AutoConfig.for_model(kind)
    given = _EXTRA.get(kind, {}) | extra
    whole = {name: value for name, value in given.items() if name not in default.sub_configs}
    config = type(default)(**_sizes_of(default) | whole)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            own = given.get(name, {})
            setattr(config, name, type(part)(**_sizes_of(part) | own))
    return config


def tiny_model(kind: str, dtype: torch.dtype = torch.float32, **extra: Any) -> PreTrainedModel:
    """The model, with random values in all of it but what its class computes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **extra), dtype=dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "A_log" not in name:
                tensor.add_(0.05 * torch.randn_like(tensor))
    return model.eval()


def save_tiny(directory: Path, kind: str, **extra: Any) -> Path:
    """The model in float32, and the tokenizer of one token for each byte; the directory."""
    tiny_model(kind, **extra).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def loss_of(model: Any) -> float:
    """The class's own loss on `IDS`."""
    with torch.no_grad():
        return float(model(input_ids=IDS.to(model.device), labels=IDS.to(model.device)).loss)


def _sizes_of(config: Any) -> dict[str, Any]:
    sizes = {key: value for key, value in _SIZES.items() if key in vars(config)}
    sizes |= {key: 0 for key in sizes if isinstance(vars(config)[key], int) and not sizes[key]}
    kinds = list(dict.fromkeys(vars(config).get("layer_types") or []))
    if kinds:
        sizes["layer_types"] = (kinds * 4)[:4]
    return sizes
