"""Which models compute sequences that share a row as if each were alone (`data.packing`).

`TYPES` is what a test finds, for every architecture of transformers, tiny and random: loss and
gradient of a packed row against those of each sequence alone (`docs/packing.md`, made by it). What
a configuration of such a type can have that changes this is looked for in the model itself.
"""

from __future__ import annotations

from typing import Any

from torch import nn

TYPES = frozenset("""llama""".split())
_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "dense", "sparse"}
_KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def why_not(model: Any) -> str:
    """Why sequences cannot share a row of a model, which may be on the meta device; "": they can."""
    config = model.config
    text = config.get_text_config()
    kind, name = config.model_type, type(model).__name__
    if kind not in TYPES or not _is_of_transformers(model):
        return f"{name} ({kind}) is not among the architectures that pack (docs/packing.md)"
    if config._attn_implementation not in _KERNELS:
        return f"model.attn_implementation: {config._attn_implementation} does not pack"
    if others := {*(getattr(text, "layer_types", None) or ())} - _LAYERS:
        return f"{name} has layers of another kind than attention: {', '.join(sorted(others))}"
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
