"""What servers of LoRA adapters cannot load, said at export.

They read PEFT's two files, and less of them than PEFT does. vLLM, SGLang, LoRAX and TGI scale all
modules by the one `lora_alpha / r` of the settings, and have no place for what is not a LoRA of a
linear layer.

Source: vLLM's `PEFTHelper` (vllm/lora/peft_helper.py) and `LoRAConfig`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

SERVERS = "vLLM, SGLang, LoRAX and TGI"
DEFAULT_MAX_RANK = 16  # of vLLM
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM allows
_ENDS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")


def serving_lines(settings: Mapping[str, Any], keys: Collection[str]) -> Iterator[str]:
    """A line for each thing in an adapter that servers cannot load, or load only when told.

    Args:
        settings: `adapter_config.json`.
        keys: of the tensors.
    """
    cannot = []
    if settings.get("use_dora"):
        cannot.append("use_dora")
    if settings.get("modules_to_save"):
        cannot.append(f"modules_to_save ({', '.join(settings['modules_to_save'])})")
    if settings.get("bias", "none") != "none":
        cannot.append(f"bias: {settings['bias']}")
    if settings.get("target_parameters"):
        cannot.append("target_parameters")
    modules = {key.partition(".lora_")[0].rpartition(".")[2] for key in keys if ".lora_" in key}
    if ends := sorted(modules & set(_ENDS)):
        cannot.append(f"adapters of {', '.join(ends)}")
    if patterns := [n for n in ("rank_pattern", "alpha_pattern") if settings.get(n)]:
        cannot.append(f"{' and '.join(patterns)}, since they scale all modules alike")
    if cannot:
        yield f"{SERVERS} cannot load this adapter: {'; '.join(cannot)}. --merge writes a model"
        return
    if (r := settings["r"]) > DEFAULT_MAX_RANK:
        wanted = next((rank for rank in MAX_RANKS if rank >= r), None)
        if wanted is None:
            yield f"vLLM loads adapters of r up to {MAX_RANKS[-1]}, and this one has {r}"
        else:
            yield f"vLLM loads this adapter with --max-lora-rank {wanted} or more (r is {r})"
