"""Kernels that compute the attention of sequences of many lengths at once, on CUDA.

They take where each sequence begins, on the device, so the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_LARGEST = 256  # of a head, in flash attention's kernels
# Arguments that change nothing here; `scaling` and `sliding_window` are taken.
_KNOWN = {"scaling", "sliding_window", "dropout", "is_causal"}
_WITHOUT_MEANING = {"position_ids", "cache_position", "use_cache", "output_attentions"}


class Row(Protocol):
    """What a kernel needs to know of a packed row."""

    @property
    def lengths(self) -> tuple[int, ...]: ...

    def offsets(self, device: torch.device) -> Tensor: ...


def by_torch(
    row: Row, qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, how: dict[str, Any]
) -> Tensor | None:
    """[1, T, heads, D] by torch's kernel; None where it cannot.

    Args:
        qkv: each [1, heads, T, D].
        mask: what the class passes to its attention.
        how: the other arguments of transformers' attention function.
    """
    query, key, value = qkv
    if not takes(qkv, mask, how):
        return None
    from torch.nn.attention.varlen import varlen_attn  # it imports torch's compiler

    window = how.get("sliding_window")
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in qkv)
    offsets, longest = row.offsets(query.device), max(row.lengths)
    found = varlen_attn(
        q,
        k,
        v,
        offsets,
        offsets,
        longest,
        longest,
        scale=how.get("scaling"),
        window_size=(window - 1 if mask is not None and window else -1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(found, Tensor)
    return found.unsqueeze(0)


def takes(qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, how: dict[str, Any]) -> bool:
    """Whether torch's kernel computes what is asked: causal, at most with a window."""
    query, _, value = qkv
    asked = {name for name, given in how.items() if given is not None} - _WITHOUT_MEANING
    return (
        asked <= _KNOWN
        and not how.get("dropout")
        and how.get("is_causal") is not False
        and (mask is None or how.get("sliding_window") is not None)
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= _LARGEST
        and query.shape[-1] % 8 == 0
        and not torch.are_deterministic_algorithms_enabled()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def by_flash_attention(
    row: Row,
    own: Callable[..., Any],
    module: nn.Module,
    qkv: tuple[Tensor, Tensor, Tensor],
    how: dict[str, Any],
) -> Any:
    """What transformers' function for the package flash-attn returns for a packed row."""
    offsets, longest = row.offsets(qkv[0].device), max(row.lengths)
    lengths: dict[str, Any] = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    lengths |= {"max_length_q": longest, "max_length_k": longest}
    return own(module, *qkv, None, **how | lengths)
