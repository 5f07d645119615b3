"""Activation checkpointing: blocks keep their input and compute the rest again in backward.

A class of transformers that has it switches it on itself. Any other model's blocks, the members of
its lists of blocks, are wrapped here in the same way: around `forward`, so that the hooks of a
sharded base stay outside and run once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from dlora.sharding.engines.gather_groups import block_lists

# Arguments of a block by which it would write into a cache, and so twice.
CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "cache")


def recompute_blocks(model: Any, every: int, offload: bool = False) -> None:
    """Let blocks recompute their activations while the model trains.

    Args:
        every: each so many-th block does, the first among them; 0: none.
        offload: what they keep, their inputs, lies in host memory meanwhile.
    """
    if not every:
        return
    if _has_its_own(model):
        kinds = {"every_n_layers": every, "offload": offload}
        model.activation_checkpointing_enable({"use_reentrant": False}, **kinds)
        # The embeddings' gradients are what reentrant checkpointing needs. Here they would be
        # computed for nothing, and some models add to the embeddings in place, as to no leaf.
        model.disable_input_require_grads()
        return
    for block in list(_blocks(model))[::every]:
        block.forward = _recomputing(model, block.forward, offload)


def _has_its_own(model: Any) -> bool:
    """Whether the class has activation checkpointing, in modules that this model contains."""
    return getattr(model, "supports_gradient_checkpointing", False) and any(
        hasattr(module, "gradient_checkpointing") for module in model.modules()
    )


def lists_of_blocks(model: nn.Module) -> list[list[nn.Module]]:
    """The blocks of each of a model's lists of them, in their order."""
    return [list(model.get_submodule(path).children()) for path in block_lists(model)]


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    for blocks in lists_of_blocks(model):
        yield from blocks


def _recomputing(
    model: nn.Module, forward: Callable[..., Any], offload: bool
) -> Callable[..., Any]:
    @functools.wraps(forward)
    def recomputing(*args: Any, **kwargs: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        kwargs |= {name: None for name in CACHES if kwargs.get(name) is not None}
        if kwargs.get("use_cache"):
            kwargs["use_cache"] = False
        if not offload:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        with save_on_cpu(pin_memory=torch.cuda.is_available()):
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recomputing
