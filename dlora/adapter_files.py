"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Stock PEFT loads what is written here, and what it writes is loaded here. Keys are
`base_model.model.<path>.lora_A.weight`; embeddings have `lora_embedding_A` without `.weight`, and
modules trained whole stand under their own names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dlora.api import attach
from dlora.errors import UsageError
from dlora.files import write_atomically
from dlora.lora.attach import Attachment, attachment_of, named_adapters, named_copies
from dlora.lora.config import LoraConfig
from dlora.lora.hosts import HostMixin

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_READ = {  # PEFT's keys that have a meaning here, with the value that means "not used"
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "layers_to_transform": None,
    "layer_replication": None,
    "megatron_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "exclude_modules": None,
    "arrow_config": None,
    "alora_invocation_tokens": None,
}


def save_adapter(
    model: nn.Module, directory: str | Path, *, base_model_name_or_path: str | None = None
) -> None:
    """Write the adapter of `model` so that stock PEFT loads it. Any rank may, without a collective.

    Args:
        directory: created if need be; each file is written beside its place and renamed.
        base_model_name_or_path: recorded in the configuration; by default the model's own.

    Raises:
        UsageError: nothing is attached, or a tensor is empty.
    """
    tensors = peft_tensors(model)
    for key, tensor in tensors.items():
        if tensor.numel() == 0:
            raise UsageError(f"save_adapter: {key} is empty; refusing to write it")
    name = base_model_name_or_path or getattr(getattr(model, "config", None), "name_or_path", None)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    text = json.dumps(peft_config(model, name), indent=2, sort_keys=True) + "\n"
    write_atomically(directory / CONFIG, text.encode())


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Load an adapter that dlora or PEFT wrote; attaches it first where nothing is attached.

    Raises:
        UsageError: a file is missing or damaged, is no LoRA, uses something that dlora does not
            have, or does not fit the model; the message names the file and the key.
    """
    directory = Path(directory)
    config = read_config(directory)
    if not hasattr(model, "dlora"):
        attach(model, config)
    expected = peft_slots(model)
    tensors = _read_tensors(directory / WEIGHTS)
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or extra:
        what, keys = ("lacks", missing) if missing else ("has the unexpected", extra)
        raise UsageError(f"{directory / WEIGHTS}: {what} {_some(keys)}")
    with torch.no_grad():
        for key, slot in expected.items():
            if tensors[key].shape != slot.shape:
                raise UsageError(
                    f"{directory / WEIGHTS}: {key} has shape {list(tensors[key].shape)}, "
                    f"the model expects {list(slot.shape)}"
                )
            slot.copy_(tensors[key])
    return model


def read_config(directory: str | Path) -> LoraConfig:
    """The `LoraConfig` of an adapter directory; see `load_adapter` for the errors."""
    path = Path(directory) / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file, so {directory} is no adapter") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else None
        raise UsageError(f"{path}: peft_type is {kind!r}; only LORA can be loaded")
    for key, unused in _READ.items():
        if raw.get(key, unused) not in (unused, None, [], {}):
            raise UsageError(f"{path}: {key}: {raw[key]!r} is not supported")
    return LoraConfig(
        r=raw["r"],
        lora_alpha=raw["lora_alpha"],
        lora_dropout=raw.get("lora_dropout") or 0.0,
        target_modules=_targets(raw.get("target_modules")),
        use_rslora=bool(raw.get("use_rslora")),
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        modules_to_save=tuple(raw.get("modules_to_save") or ()),
    )


def peft_config(model: nn.Module, base_model_name_or_path: str | None) -> dict[str, Any]:
    """`adapter_config.json` of an attached model."""
    attachment = attachment_of(model)
    config = attachment.config
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "get_output_embeddings") else None,
        "base_model_name_or_path": base_model_name_or_path,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": peft_targets(model, attachment),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "modules_to_save": sorted(config.modules_to_save) or None,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "fan_in_fan_out": _stored_transposed(model),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def peft_targets(model: nn.Module, attachment: Attachment) -> list[str]:
    """Last names where they mean exactly the adapted modules, full paths where they would not."""
    names = {path.rpartition(".")[2] for path in attachment.adapted}
    meant = {
        path
        for path, _ in model.named_modules()
        if path.rpartition(".")[2] in names and ".adapter" not in path
    }
    return sorted(names if meant == set(attachment.adapted) else attachment.adapted)


def peft_slots(model: nn.Module) -> dict[str, Tensor]:
    """The live tensors of an attached model under PEFT's keys."""
    slots: dict[str, Tensor] = {}
    for path, host, adapter in named_adapters(model):
        embedding = isinstance(host, HostMixin) and host.is_embedding
        names = ("lora_embedding_{}", "") if embedding else ("lora_{}", ".weight")
        for factor, tensor in (("A", adapter.lora_A), ("B", adapter.lora_B)):
            slots[f"{_PREFIX}{path}.{names[0].format(factor)}{names[1]}"] = tensor.detach()
    for path, _, copy in named_copies(model):
        for name, parameter in copy.named_parameters():
            slots[f"{_PREFIX}{path}.{name}"] = parameter.detach()
    return slots


def peft_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Float32 copies of `peft_slots` on the CPU, each owning its storage."""
    return {
        key: tensor.to("cpu", torch.float32, copy=True).contiguous()
        for key, tensor in peft_slots(model).items()
    }


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: is damaged or no safetensors file: {error}") from None


def _targets(raw: Any) -> str | list[str]:
    return raw if isinstance(raw, str) else sorted(raw or ())


def _stored_transposed(model: nn.Module) -> bool:
    """PEFT's `fan_in_fan_out`: the adapted layers are Conv1D (an embedding does not count)."""
    hosts = [host for _, host, _ in named_adapters(model)]
    return any(h.transposed and not h.is_embedding for h in hosts if isinstance(h, HostMixin))


def _some(keys: set[str]) -> str:
    ordered = sorted(keys)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
