"""In training, W0 computes as it does in evaluation: nothing of it is drawn at random.

A base may drop activations, add noise to a router or skip layers while it is in training mode. It
draws from the generator of the process, so a loss would depend on the rank and on the micro-batch
that a sequence is in. W0 is frozen and cannot overfit; A and B have a dropout of their own, which
is keyed by the sample (`dlora.lora.dropout`). So only adapters are ever in training mode.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from dlora.lora.variants import LoraAdapter

_RANDOM = re.compile(r"dropout|pdrop|drop_?(path|rate|prob)|layer_?drop|jitter")
# Their own mode means something else, and they draw nothing: in eval mode an xLSTM computes long
# sequences without a gradient, and an RWKV rescales its weights in place.
_OTHERWISE = {"xLSTMModel", "RwkvModel"}
_ELSEWHERE = re.compile(r"classif|summary")  # of heads that predict no next token


def keep_in_eval(model: nn.Module) -> None:
    """Let `model.train()` put adapters into training mode, and W0 into none.

    Call it once activation checkpointing is enabled: layers that recompute their activations look
    at their own mode whether to do so, and see it off again in what they recompute.
    """
    model.train = types.MethodType(_train, model)  # type: ignore[method-assign]
    for layer in _recomputed(model):
        own = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = functools.partial(_recompute_in_eval, layer, own)


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    type(model).train(model, False)
    if mode:
        # Found by their class: a trace runs a model whose record names more blocks than it has.
        found = (m for m in model.modules() if isinstance(m, LoraAdapter))
        adapters = (m for adapter in found for m in adapter.modules())
        others = (m for m in model.modules() if {k.__name__ for k in type(m).mro()} & _OTHERWISE)
        for module in (model, *adapters, *_recomputed(model), *others):
            module.training = True
    return model


def _recomputed(model: nn.Module) -> Iterator[Any]:
    """Modules that check `self.training` before they recompute."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if not getattr(module, "gradient_checkpointing", False):
            continue
        # A stack of transformers' own leaves it to its layers; code that came with a base may not.
        foreign = not any(
            k.__module__.startswith("transformers.models.") for k in type(module).mro()
        )
        if isinstance(module, GradientCheckpointingLayer) or foreign:
            yield module


def _recompute_in_eval(layer: nn.Module, own: Callable[..., Any], run: Any, *args: Any) -> Any:
    """Checkpoint `run(*args)`, during which the layer is in eval mode, now and when recomputed."""

    def in_eval(*again: Any) -> Any:
        layer.training = False
        try:
            return run(*again)
        finally:
            layer.training = True

    return own(in_eval, *args)


def random_settings(model: nn.Module) -> list[str]:
    """What a base draws at random in training mode, as `name value`; [] if it draws nothing."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return list(_named(text.to_dict()))
    dropouts = {m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p}
    return sorted({f"{type(m).__name__} {m.p:g}" for m in dropouts})


def _named(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _named(value, f"{prefix}{name}.")
        acts = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        if acts and _RANDOM.search(name) and not _ELSEWHERE.search(name):
            yield f"{prefix}{name} {value:g}"
