"""Which models compute sequences that share a row as if each were alone (`data.packing`).

`TYPES` is what a test finds, for every architecture of transformers, tiny and random: loss and
gradient of a packed row against those of each sequence alone (`docs/packing.md`, made by it). What
a configuration of such a type can have that changes this is looked for in the model itself.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_TYPES = """
afmoe apertus arcee aria aria_text axk1 aya_vision beam bert bert-generation biogpt bitnet cohere
cohere2 cohere2_moe cohere2_vision cohere_compass cohere_compass_text cosmos3_omni ctrl cwm dbrx
deepseek_v2 deepseek_v3 deepseek_vl deepseek_vl_hybrid diffllama dots1 electra emu3_text_model
ernie ernie4_5 ernie4_5_moe exaone4 exaone4_5 exaone_moe flex_olmo flint fuyu gemma gemma2 gemma3
gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text glm glm4 glm46v
glm4_moe glm4_moe_lite glm4v glm4v_moe glm4v_moe_text glm4v_text glm_ocr glm_ocr_text glmga
got_ocr2 gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_docling granite_docling_text
granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense
hunyuan_v1_moe hy_v3 hyperclovax hyperclovax_vision_v2 idefics2 idefics3 internlm3 internvl
iquestcoder jais2 janus jetmoe kimi_k25 kolibri1 laguna lighton_ocr llama llama4_text llava
llava_next llava_next_video llava_onevision longcat_flash mellum mimo_v2_flash minicpm3 minimax_m2
ministral ministral3 mistral mistral3 mistral4 mixtral mllama_text_model modernbert-decoder moshi
moss_transcribe_diarize muse_glimmer muse_glimmer_text nanochat nemotron olmo olmo2 olmo3 olmoe
opt ovis2 paddleocr_vl paddleocr_vl_text persimmon phi phi3 phi4_multimodal phimoe pp_chart2table
qianfan_ocr qwen2 qwen2_5_omni_text qwen2_5_omni_thinker qwen2_5_vl qwen2_5_vl_text qwen2_moe
qwen2_vl qwen2_vl_text qwen3 qwen3_moe qwen3_omni_moe_text qwen3_omni_moe_thinker qwen3_vl
qwen3_vl_moe qwen3_vl_moe_text qwen3_vl_text roc_bert seed_oss shieldgemma2 smollm3 smolvlm
solar_open stablelm starcoder2 unlimited_ocr unlimited_ocr_text vaultgemma video_llama_3
video_llava vipllava whisper youtu
"""
TYPES = frozenset(_TYPES.split())
_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def why_not(model: Any) -> str:
    """Why sequences cannot share a row of a model, maybe on the meta device; "": they can."""
    config = model.config
    text = config.get_text_config()
    name, kinds = type(model).__name__, {config.model_type, text.model_type}
    if others := sorted(kinds - TYPES):
        return f"{name} ({others[0]}) is not among the architectures that pack (docs/packing.md)"
    if not _is_of_transformers(model):
        return f"{name} is code of the base's own"
    if config._attn_implementation not in _KERNELS:
        return f"model.attn_implementation: {config._attn_implementation} does not pack"
    if layers := sorted({*(getattr(text, "layer_types", None) or ())} - _LAYERS):
        return f"{name} has layers of another kind than plain attention: {', '.join(layers)}"
    if getattr(text, "alibi", False):
        return f"{name} adds a bias by position to attention (alibi)"
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv1d) and "vision" not in path and "audio" not in path:
            return f"{name}: {path} is a convolution over tokens"
    return ""


def _is_of_transformers(model: nn.Module) -> bool:
    """Whether its class, before adapters, is transformers' own and not code of the base's files."""
    return any(
        base.__module__.startswith("transformers.models.") for base in type(model).__mro__
    ) and not any(
        base.__module__.startswith("transformers_modules.") for base in type(model).__mro__
    )
