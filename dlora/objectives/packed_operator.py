"""The attention of a packed row as one operator, which a compiled graph does not look into.

The row is computed a sequence at a time, by as many calls as it has sequences. A graph would hold
for one list of lengths. As an operator it reads the lengths when it runs, and so does its gradient,
which computes the attention again:

    dq, dk, dv = vjp(attention)(q, k, v; dy)
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HANDLE = "dlora_handle"  # of a module: int64 scalar; a tensor, whose value no graph depends on
WITHOUT_MEANING = {"position_ids", "cache_position", "use_cache", "output_attentions"}

Attend = Callable[..., Tensor]  # (module, (q, k, v), mask, **how) → [1, T, heads, D]

_modules: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_functions: dict[str, Attend] = {}


def give_handle(module: nn.Module) -> None:
    """Let `attention` know a module by a tensor."""
    if HANDLE not in module.__dict__:
        module.__dict__[HANDLE] = torch.tensor(id(module))
        _modules[id(module)] = module


def add_function(name: str, attend: Attend) -> None:
    """Let `attention` know a function by its name."""
    _functions[name] = attend


def attention(
    name: str,
    module: nn.Module,
    qkv: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    how: dict[str, Any],
) -> Tensor:
    """[1, T, heads, D] by the function `name`; for graphs.

    Args:
        qkv: each [1, heads, T, D].
        how: other arguments; only those that are known can be passed on.
    """
    given = {n: value for n, value in how.items() if value is not None and n not in WITHOUT_MEANING}
    scaling, dropout = given.pop("scaling", None), given.pop("dropout", 0.0)
    window, cap = given.pop("sliding_window", None), given.pop("softcap", None)
    if given:
        raise NotImplementedError(f"attention with {', '.join(sorted(given))}")
    handle = getattr(module, HANDLE)
    return _attention(*qkv, mask, handle, name, scaling, dropout, window, cap)


@torch.library.custom_op("dlora::packed_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    module: Tensor,
    name: str,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    how = _named(scaling, dropout, sliding_window, softcap)
    return _functions[name](_modules[int(module)], (q, k, v), mask, **how).contiguous()


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, module: Tensor, *how: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


def _free_name() -> str:
    """A name for the operator below, which torch keeps where dlora is imported once more."""
    names = (f"packed_attention_backward{number or ''}" for number in itertools.count())
    return next(name for name in names if not hasattr(torch.ops.dlora, name))


_BACKWARD = _free_name()
_library = torch.library.Library("dlora", "FRAGMENT")
_library.define(
    f"{_BACKWARD}(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? mask, "
    "Tensor module, str name, float? scaling, float dropout, int? window, float? cap) "
    "-> (Tensor, Tensor, Tensor)"
)


def _gradients(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    module: Tensor,
    name: str,
    *how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        qkv = tuple(x.detach().requires_grad_() for x in (q, k, v))
        y = _functions[name](_modules[int(module)], qkv, mask, **_named(*how))
        dq, dk, dv = torch.autograd.grad(y, qkv, dy)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


_library.impl(_BACKWARD, _gradients, "CompositeExplicitAutograd")


@torch.library.register_fake(f"dlora::{_BACKWARD}")
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *how: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, mask, module, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, mask, module)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    found = getattr(torch.ops.dlora, _BACKWARD)(dy, *ctx.saved_tensors, *ctx.how)
    return *found, *(None for _ in range(7))


_attention.register_autograd(_backward, setup_context=_save)


def _named(
    scaling: float | None, dropout: float, sliding_window: int | None, softcap: float | None
) -> dict[str, Any]:
    """The arguments of an attention function; those that were not given are left out."""
    named = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
    return {"dropout": dropout} | {n: value for n, value in named.items() if value is not None}
