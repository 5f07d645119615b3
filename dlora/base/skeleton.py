"""The model on the meta device, as `from_pretrained` would make it of a configuration and files.

`from_config` alone differs from it in three things, which are mended here: the dtype of tensors
that a class pins to float32, weights that a configuration ties although the files have two
different ones, and the attention of a class without `sdpa`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from dlora.base.repeated_calls import calls_by_length
from dlora.errors import UsageError
from dlora.sharding.topology import Placement

AUTO = "auto"  # the value of `model.attn_implementation` that leaves the choice to the class
# What a class says of the kernels that it can use; `eager` has no flag.
_FLAGS = {"sdpa": "_supports_sdpa", "flash": "_supports_flash_attn", "flex": "_supports_flex_attn"}


def auto_class(config: Any) -> Any:
    """The auto class of transformers that a base is built by.

    A model that takes images is a causal language model as well, of text alone, where transformers
    lists it only among those that answer about images (LLaVA).
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind, own_code = type(config), getattr(config, "auto_map", None) or {}
    if kind in AutoModelForCausalLM._model_mapping or AutoModelForCausalLM.__name__ in own_code:
        return AutoModelForCausalLM
    takes_images = kind in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if takes_images else AutoModelForCausalLM


def with_attention(build: Callable[..., Any], implementation: str) -> Any:
    """`build()`, a skeleton, with `attn_implementation` unless that is `auto`.

    Raises:
        UsageError: the class cannot use that implementation, or not on this machine.
    """
    if implementation == AUTO:
        return build()
    try:
        return build(attn_implementation=implementation)
    except (ValueError, ImportError) as error:
        first = str(error.__cause__ or error).strip().split("\n")[0].split(". ")[0]
        reason = first.rpartition("following error: ")[2].rstrip(".")
    model = build()  # fails once more where something else is wrong
    check_attention(model, implementation)
    raise UsageError(f"model.attn_implementation: {implementation} cannot be used: {reason}")


def check_attention(model: Any, implementation: str) -> None:
    """Raise a `UsageError` if a model's class has no kernel of that name."""
    flag = _FLAGS.get(implementation.partition("_")[0])
    if flag is not None and not getattr(model, flag, True):
        raise UsageError(
            f"model.attn_implementation: {type(model).__name__} does not support {implementation}; "
            f"auto takes {model.config._attn_implementation}"
        )


def pinned_dtypes(model: Any, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """{name: dtype} of the tensors that a class wants in another dtype than the model's."""
    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    if not plan:
        return {}
    from transformers.core_model_loading import build_glob_alternation

    pattern, keys, _ = build_glob_alternation(list(plan))
    found = ((name, pattern.search(name)) for name in names)
    return {name: plan[keys[match.lastgroup]] for name, match in found if match and match.lastgroup}


def pin_dtypes(skeleton: Any, dtype: torch.dtype) -> None:
    """Give the parameters and persistent buffers of a skeleton the dtypes that loading gives them.

    Tied parameters stay tied.
    """
    made: dict[int, nn.Parameter] = {}
    for name, pinned in pinned_dtypes(skeleton, skeleton.state_dict(), dtype).items():
        owner, _, last = name.rpartition(".")
        module = skeleton.get_submodule(owner)
        tensor = getattr(module, last)
        if not tensor.is_floating_point() or tensor.dtype == pinned:
            continue
        if last in module._buffers:
            module._buffers[last] = tensor.to(pinned)
            continue
        if id(tensor) not in made:
            made[id(tensor)] = nn.Parameter(tensor.to(pinned), requires_grad=tensor.requires_grad)
        module.register_parameter(last, made[id(tensor)])


def untie(skeleton: Any, names: Iterable[str]) -> None:
    """Give each of the tied parameters `names` of a skeleton a weight of its own.

    The configuration of a model that ties nothing any more says so, as transformers advises.
    """
    cut = set(names)
    for name in cut:
        owner, _, last = name.rpartition(".")
        module = skeleton.get_submodule(owner)
        old = module.get_parameter(last)
        own = nn.Parameter(torch.empty_like(old), requires_grad=old.requires_grad)
        module.register_parameter(last, own)
    for prefix, model in _models_in(skeleton):
        before = [*model.all_tied_weights_keys]
        for key in before:
            if prefix + key in cut:
                del model.all_tied_weights_keys[key]
        if before and not model.all_tied_weights_keys:
            model.config.tie_word_embeddings = False


def untied_config(config: Any, skeleton: Any) -> Any:
    """`config` changed so that it ties what the skeleton ties; None where it does already.

    Args:
        config: as it was read; the skeleton's own may be that of its text part.
    """
    own = config if type(config) is type(skeleton.config) else config.get_text_config()
    if getattr(skeleton.config, "tie_word_embeddings", False) or not getattr(
        own, "tie_word_embeddings", False
    ):
        return None
    own.tie_word_embeddings = False
    return config


def _models_in(skeleton: Any) -> Iterator[tuple[str, Any]]:
    """(prefix of its parameters, model) of a model and of the models inside it."""
    for path, module in skeleton.named_modules():
        if hasattr(module, "all_tied_weights_keys"):
            yield f"{path}." if path else "", module


def make_buffers(skeleton: Any) -> None:
    """Give a skeleton real buffers; the values of those in the files are still to be read."""
    for tensor in skeleton.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    skeleton._move_missing_keys_from_meta_to_device(set(), None, None, None)
    skeleton._initialize_missing_keys(False)


def set_buffers(model: nn.Module, skeleton: Any) -> None:
    """Set the buffers of a loaded model that no file has: transformers forgets some in sharding."""
    make_buffers(skeleton)
    for name, _ in skeleton.named_non_persistent_buffers():
        owner, _, last = name.rpartition(".")
        buffers = model.get_submodule(owner)._buffers
        if (buffer := buffers.get(last)) is not None:
            buffers[last] = skeleton.get_buffer(name).to(buffer.device)


def check_divides(skeleton: Any, placement: Placement) -> None:
    """Raise a `UsageError` if the engine cannot divide this model over the ranks.

    FSDP2: a rank would get no expert, and transformers cannot stack none. ZeRO-3, whose flat
    partitions may cut an expert anywhere: ranks would call modules in different order.
    """
    if placement.engine == "zero3" and placement.shard_size > 1:
        for path, caller in calls_by_length(skeleton).items():
            raise UsageError(
                f"sharding.engine: zero3: {caller} calls {path} once for each position, and "
                "DeepSpeed needs the same calls on every rank, whatever their sequences; use fsdp2"
            )
    if placement.engine != "fsdp2":
        return
    ranks = placement.shard_size
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import MergeModulelist

    stacked = tuple(
        pattern
        for transform in get_model_conversion_mapping(skeleton)
        if any(isinstance(op, MergeModulelist) for op in getattr(transform, "operations", ()))
        for pattern in transform.target_patterns
    )
    for path, parameter in skeleton.named_parameters():
        if not path.endswith(stacked):
            continue
        experts = parameter.shape[0]
        if -(-experts // ranks) * (ranks - 1) >= experts:
            raise UsageError(
                f"sharding.base: {path} has {experts} experts, so some of {ranks} ranks would get "
                "none; shard W0 over fewer ranks (base: node, or none)"
            )
