"""What PEFT's files have of an attached model: `adapter_config.json`, and the tensors' values.

Their names are those of `peft_names.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from dlora.adapters.peft_names import MAGNITUDE, PREFIX, copy_names, keys_of, shaped
from dlora.adapters.task_type import auto_mapping_of, task_type_of
from dlora.errors import UsageError
from dlora.lora.attach import (
    Attachment,
    attachment_of,
    named_adapters,
    trainable_parameters,
)
from dlora.lora.names import bare
from dlora.lora.tasks import head_names
from dlora.lora.variants import PlainLora
from dlora.lora.variants.adalora import AdaLoraAdapter, AdaLoraConfig
from dlora.lora.variants.dora import DoraAdapter

NO_TARGETS = "dummy-target-modules"  # PEFT's word for an adapter of `modules_to_save` alone
# Experts' layers before transformers 5, by layout: PEFT's `_MOE_TARGET_MODULE_MAPPING`.
_EXPERTS_OF = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
_RANK_EPSILON = 1e-5  # PEFT scales AdaLoRA by lora_alpha / (init_r + this)


def plain_forms(model: nn.Module) -> dict[str, PlainLora]:
    """The plain LoRA of every adapted module by path, without those that a method pruned to rank 0.

    Any other of rank 0 is included: its tensors are missing, as where they are partitioned.

    Raises:
        UsageError: every adapter has rank 0.
    """
    found = [(path, adapter, adapter.as_lora()) for path, _, adapter in named_adapters(model)]
    forms = {path: form for path, _, form in found}
    left = {path: form for path, adapter, form in found if form.r or not adapter.prunes}
    if forms and not left:
        raise UsageError(
            "save_adapter: the adapter is empty, because every singular value is 0; train it first"
        )
    return left


def lora_files(
    model: nn.Module, base: str | None, forms: dict[str, PlainLora] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The files of the model's adapters in their plain form, or as a DoRA, which has none.

    Args:
        base: name or path of the base, to be recorded.
        forms: the plain LoRA of every module by path, where it is another one than that of
            `plain_forms`.

    Returns:
        The content of `adapter_config.json`, and the tensors by PEFT's keys.
    """
    forms, attached = plain_forms(model) if forms is None else forms, attachment_of(model)
    config = attached.config
    tensors: dict[str, Tensor] = {}
    for path, layer, adapter in named_adapters(model):
        if path in forms:
            parts = {"lora_A": forms[path].A, "lora_B": forms[path].B}
            if isinstance(adapter, DoraAdapter):
                parts[MAGNITUDE] = adapter.lora_magnitude_vector.detach()
            for name, key in keys_of(model, path, layer, adapter).items():
                tensors[key] = shaped(layer, name, parts[name])
    sizes: dict[str, Any] = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "use_rslora": config.use_rslora,
    }
    usual = {path: (config.r_for(path), config.scaling_for(path)) for path in forms}
    as_set = all((form.r, form.scaling) == usual[path] for path, form in forms.items())
    if forms and not (as_set and config.method == "lora"):
        sizes = _sizes(forms)
    settings = {"peft_type": "LORA", **_common(model, base, forms), **sizes}
    settings["use_dora"] = config.use_dora
    parameters = sorted(config.target_parameters)
    if taken := taken_for_experts(model, [p for p in forms if p not in attached.parameters]):
        rest = [path for path in forms if path not in (*taken, *attached.parameters)]
        settings["target_modules"] = peft_targets(model, attached, rest)
        settings["lora_dropout"] = 0.0  # PEFT has none for parameters, and no use for it here
        parameters += [f"{path}.weight" for path in taken]
        for key in ("rank_pattern", "alpha_pattern"):
            settings[key] |= {rf"({name})\.weight": v for name, v in settings[key].items()}
    if parameters:
        settings["target_parameters"] = parameters
    return settings, _written(tensors | _copies(model))


def taken_for_experts(model: nn.Module, adapted: Collection[str]) -> list[str]:
    """The adapted linear layers that PEFT, by their names, takes for experts of an older layout.

    In models whose experts transformers 5 stacked it turns such targets into `target_parameters`
    of the stacks, and drops what else has the name: dense layers and shared experts. Named as
    parameters themselves they are what they are.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        return []
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as LAYOUTS

    names = _EXPERTS_OF.get("mixtral" if kind == "mixtral" else LAYOUTS.get(kind, ""), ())
    return [path for path in adapted if path.rpartition(".")[2] in names]


def adalora_files(model: nn.Module, base: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The files of an AdaLoRA in its own form; as `lora_files`, of the triplets that are left.

    PEFT's scale is lora_alpha / (init_r + 1e-5); E is stored times the ratio of dlora's to it.

    Raises:
        UsageError: the model has no AdaLoRA, no `total_step`, without which PEFT refuses to load
            it, or an adapted embedding, which PEFT has no form for.
    """
    config = attachment_of(model).config
    if not isinstance(config, AdaLoraConfig):
        raise UsageError(
            f"peft_type: ADALORA needs an adalora adapter, but this one is {config.method}"
        )
    if config.total_step is None:
        raise UsageError("total_step: PEFT cannot load ADALORA without it; set it in AdaLoraConfig")
    tensors: dict[str, Tensor] = {}
    pattern: dict[str, list[bool]] = {}
    adapted = []
    for path, layer, adapter in named_adapters(model):
        assert isinstance(adapter, AdaLoraAdapter)
        if layer.is_embedding or layer.kernel(layer):
            what = "embedding" if layer.is_embedding else "convolution"
            raise UsageError(f"peft_type: PEFT's ADALORA does not support the {what} {path}")
        left = adapter.triplets()
        correction = adapter.scaling * (config.init_r + _RANK_EPSILON) / config.lora_alpha
        for name, (dim, indices) in adapter.cuts(left).items():
            tensor = adapter.get_parameter(name).detach().index_select(dim, indices)
            tensors[f"{PREFIX}{path}.{name}"] = tensor * correction if name == "lora_E" else tensor
        pattern[f"{path}.lora_E"] = [i < len(left) for i in range(config.init_r)]
        adapted.append(path)
    settings = {
        "peft_type": "ADALORA",
        **_common(model, base, adapted),
        "r": config.init_r,
        "lora_alpha": config.lora_alpha,
        "rank_pattern": pattern,
    }
    for name in ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2"):
        settings[name] = getattr(config, name)
    settings["orth_reg_weight"], settings["total_step"] = config.orth_reg_weight, config.total_step
    return settings, _written(tensors | _copies(model))


def _common(model: nn.Module, base: str | None, adapted: Collection[str]) -> dict[str, Any]:
    attachment, task = attachment_of(model), task_type_of(model)
    modules = [path for path in adapted if path not in attachment.parameters]
    return {
        "task_type": task,
        "auto_mapping": None if task else auto_mapping_of(model),
        "base_model_name_or_path": base,
        "lora_dropout": attachment.config.lora_dropout,
        "target_modules": peft_targets(model, attachment, modules) if adapted else NO_TARGETS,
        "modules_to_save": _saved_names(model, attachment) or None,
        "fan_in_fan_out": _stored_transposed(model),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _saved_names(model: nn.Module, attachment: Attachment) -> list[str]:
    """The names by which PEFT finds the modules that are trained whole."""
    config = attachment.config
    names = {*config.modules_to_save, *head_names(model, config.task_type)}
    return sorted(n for n in names if any(path.endswith(n) for path in attachment.saved))


def _sizes(forms: dict[str, PlainLora]) -> dict[str, Any]:
    """r and lora_alpha of most modules, and those of the others by their paths.

    A path also means what ends with it, and the first that matches counts: longer ones go first.
    """
    alphas = {path: _shortest(form.scaling * form.r) for path, form in forms.items()}
    usual = Counter((form.r, alphas[path]) for path, form in forms.items()).most_common(1)[0][0]
    ordered = sorted(forms, key=len, reverse=True)
    return {
        "r": usual[0],
        "lora_alpha": usual[1],
        "rank_pattern": {path: forms[path].r for path in ordered if forms[path].r != usual[0]},
        "alpha_pattern": {path: alphas[path] for path in ordered if alphas[path] != usual[1]},
        "use_rslora": False,
    }


def _shortest(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def peft_targets(
    model: nn.Module, attachment: Attachment, adapted: Collection[str]
) -> list[str] | str:
    """`target_modules` with which PEFT adapts exactly the modules `adapted`.

    The shortest that will do: last names, else full paths, else an expression (a path such as
    `head` also means `block.head`).
    """
    with bare(model):
        paths = [path for path, _ in model.named_modules() if path]
    wanted = set(adapted)
    for names in ({path.rpartition(".")[2] for path in wanted}, wanted):
        suffixes = tuple(f".{name}" for name in names)
        meant = {p for p in paths if f".{p}".endswith(suffixes) and not _in_saved(p, attachment)}
        if meant == wanted:
            return sorted(names)
    return "|".join(re.escape(path) for path in adapted)


def _in_saved(path: str, attachment: Attachment) -> bool:
    return any(f"{path}.".startswith(f"{saved}.") for saved in attachment.saved)


def _copies(model: nn.Module) -> dict[str, Tensor]:
    parameters = trainable_parameters(model)
    return {key: parameters[name].detach() for name, key in copy_names(model).items()}


def _written(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float32 copies on the CPU, each owning its storage."""
    return {
        key: tensor.to("cpu", torch.float32, copy=True).contiguous()
        for key, tensor in tensors.items()
    }


def _stored_transposed(model: nn.Module) -> bool:
    """PEFT's `fan_in_fan_out`: the adapted layers are Conv1D (an embedding does not count)."""
    layers = [layer for _, layer, _ in named_adapters(model)]
    return any(layer.transposed and not layer.is_embedding for layer in layers)
