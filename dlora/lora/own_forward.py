"""Whether a class with a forward of its own computes what `nn.Linear` or `nn.Embedding` does.

A name says nothing, and neither does a base class: Falcon's Linear multiplies by another spelling,
Llama 4's router is a Linear that returns two tensors. So the forward itself is tried, in float64,
on a stand-in of the module with a small random weight, and its result compared.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_IN, _OUT = 6, 4  # features of the stand-in; of an embedding, rows and width
_SCALE = 3.0  # `embed_scale` of a stand-in
_CLOSE = 1e-12  # relative: rounding of float64, and of nothing less
_SIZES = (1e-3, 1.0, 1e6)  # of inputs: a forward may clip large ones


def computes_linear(module: nn.Module) -> bool:
    """Whether `module`, with `weight` [out, in] and perhaps `bias` [out], computes `F.linear`."""
    draw = torch.Generator().manual_seed(0)
    weight, bias = _random(draw, _OUT, _IN), _random(draw, _OUT)
    has_bias = getattr(module, "bias", None) is not None
    stand_in = _stand_in(module, weight, bias if has_bias else None)
    if stand_in is None:
        return False
    stand_in.__dict__ |= {"in_features": _IN, "out_features": _OUT}
    for training in (False, True):
        stand_in.__dict__["training"] = training
        for size in _SIZES:
            x = _random(draw, 2, 3, _IN) * size
            for given in (x, x[0]):
                expected = F.linear(given, weight, bias if has_bias else None)
                if not _gives(stand_in, given, expected):
                    return False
    return True


def computes_embedding(module: nn.Module) -> bool:
    """Whether `module` looks up rows of `weight` [V, dim], times `embed_scale` where it has one."""
    draw = torch.Generator().manual_seed(0)
    weight = _random(draw, _IN, _OUT)
    stand_in = _stand_in(module, weight, None)
    if stand_in is None:
        return False
    stand_in.__dict__ |= {"num_embeddings": _IN, "embedding_dim": _OUT, "padding_idx": None}
    scale = _SCALE if hasattr(module, "embed_scale") else 1.0
    if isinstance(getattr(module, "embed_scale", None), Tensor):
        stand_in._buffers["embed_scale"] = torch.tensor(_SCALE, device="cpu")
    elif hasattr(module, "embed_scale"):
        stand_in.__dict__["embed_scale"] = _SCALE
    ids = torch.tensor([[0, 5, 2], [1, 1, 3]], device="cpu")
    for training in (False, True):
        stand_in.__dict__["training"] = training
        for given in (ids, ids[0]):
            if not _gives(stand_in, given, F.embedding(given, weight) * scale):
                return False
    return True


def embed_scale(module: Any, dtype: torch.dtype) -> Tensor | float:
    """What an embedding multiplies its rows by, as its own forward does; 1.0 for a plain one."""
    scale = getattr(module, "embed_scale", 1.0)
    return scale.to(dtype) if isinstance(scale, Tensor) else scale


def _stand_in(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Any:
    """An object of the class whose forward `module` has, with its settings and another weight.

    None for weights that are no plain floats, such as another library's packed ones.
    """
    own = module._parameters.get("weight")
    is_packed = type(own) is not nn.Parameter and issubclass(type(own), nn.Parameter)
    if own is None or is_packed or not own.is_floating_point():
        return None
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    if owner is nn.Module:
        return None
    stand_in: Any = object.__new__(owner)
    stand_in.__dict__ |= vars(module)
    for slot in ("_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"):
        stand_in.__dict__[slot] = copy.copy(vars(module)[slot])
    stand_in.__dict__["_parameters"] = {
        name: {"weight": weight, "bias": bias}.get(name) for name in module._parameters
    }
    return stand_in


def _gives(stand_in: Any, given: Tensor, expected: Tensor) -> bool:
    try:
        with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
            found = stand_in.forward(given.clone())
    except Exception:  # it needs other arguments or shapes, so it is something else
        return False
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    if found.dtype != expected.dtype:
        return False
    return bool((found - expected).abs().max() <= _CLOSE * expected.abs().max())


def _random(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64, device="cpu")
