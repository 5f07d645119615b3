"""transformers' tables of attention functions and masks, whose entries learn of packed rows.

    ALL_ATTENTION_FUNCTIONS[name], a module's eager_attention_forward     ─> PackedRow.attend
    ALL_MASK_ATTENTION_FUNCTIONS[name]                                    ─> PackedRow.mask

An entry does what it did before for a model, or a row, that is not packed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dlora.objectives import packed_operator
from dlora.objectives.packed_row import OWNER, current, refuse

_ADDED = "dlora_before"  # of a function that stands in a table: what stood there
_EAGER = "eager_attention_forward"  # each module of transformers has its own, in no table


def extend_tables(model: nn.Module) -> None:
    """Let all entries know packed rows; of models that have none they do what they did."""
    attentions: Any = sys.modules.get("transformers.modeling_utils")
    masks: Any = sys.modules.get("transformers.masking_utils")
    if attentions is None or masks is None:
        return  # then no class of it is here
    _extend(attentions.ALL_ATTENTION_FUNCTIONS, _attention)
    _extend(masks.ALL_MASK_ATTENTION_FUNCTIONS, _mask)
    for name in {type(module).__module__ for module in model.modules()}:
        own = getattr(sys.modules.get(name), _EAGER, None)
        if own is not None and not hasattr(own, _ADDED):
            setattr(sys.modules[name], _EAGER, _attention("eager", own))


def _extend(table: Any, extended: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
    for name, own in list(table.items()):
        if not hasattr(own, _ADDED):
            table.register(name, extended(name, own))


def _attention(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    by_name = f"{name} of {own.__module__}"

    def attend(module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], mask: Any, **how: Any) -> Any:
        return attention(module, *qkv, mask, **how)[0]

    @functools.wraps(own)
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *args: Any,
        **how: Any,
    ) -> Any:
        row = getattr(module, OWNER, None)
        if row is not None and row.now.apart and name.startswith("flash"):
            # Of one row transformers would read all positions on the host, in every layer, to see
            # whether sequences share it.
            how.pop("position_ids", None)
        if torch.compiler.is_compiling():
            if row is None or not row.compiled:
                return own(module, query, key, value, attention_mask, *args, **how)
            return packed_operator.attention(
                by_name, module, (query, key, value), attention_mask, how
            ), None
        if row is None or not row.lengths:
            return own(module, query, key, value, attention_mask, *args, **how)
        if args:
            return refuse("it calls its attention in a way that is not known")
        qkv = (query, key, value)
        if name.startswith("flash"):
            return row.by_flash_attention(own, module, qkv, how)
        return row.attend(own, module, qkv, attention_mask, how)

    setattr(attention, _ADDED, own)
    packed_operator.add_function(by_name, attend)
    return attention


def _mask(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def mask(*args: Any, **how: Any) -> Any:
        if not current or args:
            return own(*args, **how)
        return current[-1].mask(own, how)

    setattr(mask, _ADDED, own)
    return mask
