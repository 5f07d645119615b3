"""Sequences that share one row and never see each other: what `data.packing` does to a model.

    row          a0 a1 a2 a3 | b0 b1 | c0 c1 c2 | padding      [1, T]
    positions     0  1  2  3    0  1    0  1  2                from the data, as `position_ids`

Everything but attention looks at one token at a time. transformers' classes get their attention,
and the mask for it, from two tables by the name of an implementation. There (`attention_tables`)
each entry computes a packed row a sequence at a time, by the function that was there before: so
scaling, windows, soft caps, sinks and groups of heads are those of the class, and no [T, T] mask is
made.

    attention(q, k, v) = concat_s own(q_s, k_s, v_s, mask_s)        s: the sequences of the row

A mask is a recipe that the class passes on to its attention, in the disguise of a tensor
[1, 1, T, T] of one element. Where it does not arrive there as it was made, the row is refused,
never computed in another way. On CUDA one kernel for sequences of many lengths does it all, where
there is one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dlora.errors import UsageError
from dlora.objectives.varlen import by_flash_attention, by_torch

OWNER = "dlora_packed_row"  # an attribute of every module of a model
_CPU_LENGTHS = 32  # attention is over a multiple of so many: oneDNN keeps kernels of each number
current: list[PackedRow] = []  # whose forward runs, for masks, which do not know their model


@dataclass
class _Pass:
    """What a row of a forward pass has in it."""

    lengths: tuple[int, ...] = ()
    apart: bool = False  # each sequence is known to have a row of its own
    attended: bool = False  # attention has been called
    ends: tuple[int, ...] = ()  # where tokens end that others may not be computed with
    masks: dict[int, tuple[Tensor, Callable[[int], Tensor | None]]] = field(default_factory=dict)
    offsets: dict[torch.device, Tensor] = field(default_factory=dict)


class PackedRow:
    """The row that a model computes next, if it is shared by several sequences.

    It stays until the next forward pass, or until backward comes to an earlier one (`remember`),
    since backward may recompute.

    Attributes:
        compiled: a sequence alone in its row is packed as well, so that all passes are of a kind.
    """

    def __init__(self, model: nn.Module) -> None:
        self.compiled = False
        self.now = _Pass()
        self.flash = bool(getattr(model, "_supports_flash_attn", False))
        for module in model.modules():
            module.__dict__[OWNER] = self

    def set(
        self,
        lengths: Sequence[int] | None,
        shape: torch.Size | None,
        ends: Sequence[int] = (),
    ) -> None:
        """Set what a batch of this shape [rows, tokens] has in its rows; None: it has no targets.

        Args:
            lengths: tokens of each sequence without padding; more of them than rows share one.
            ends: places in a shared row at which another adapter's tokens begin: a value there that
                is not finite stays among them.

        Raises:
            UsageError: they do not fit into one row.
        """
        self.now = _Pass(ends=tuple(ends))
        if lengths is None or shape is None:
            return
        alone = self.compiled and shape[0] == 1
        self.now.apart = len(lengths) <= shape[0] and not alone
        if self.now.apart:
            return
        padding = shape[1] - sum(lengths)
        if shape[0] != 1 or padding < 0:
            raise UsageError(
                f"model(..., lengths=...): {len(lengths)} sequences of {sum(lengths)} tokens do "
                f"not fit into {shape[0]} row(s) of {shape[1]} tokens; packed ones share one row"
            )
        self.now.lengths = (*lengths, padding) if padding else tuple(lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, and of the padding behind them; empty: not packed."""
        return self.now.lengths

    def remember(self, outputs: Any) -> Any:
        """A pass's outputs, whose backward has the row of that pass, whatever came after it."""
        if not torch.is_grad_enabled():
            return outputs
        return tree_map(
            lambda x: _Remembered.apply(x, self) if getattr(x, "requires_grad", False) else x,
            outputs,
        )

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around the model's forward.

        Raises:
            UsageError: its attention is none of transformers' table.
        """
        if not self.lengths:
            yield
            return
        current.append(self)
        try:
            yield
        finally:
            current.pop()
        if not self.now.attended:
            raise UsageError(
                "data.packing: the model's attention is not one of transformers' table, so the "
                "sequences of a row would see each other"
            )

    def mask(self, own: Callable[..., Any], how: dict[str, Any]) -> Tensor | None:
        """The mask that `own` makes of a sequence alone, as a recipe for `attend`."""
        total = sum(self.lengths)
        if how["q_length"] != total or how["kv_length"] != total:
            return refuse("its masks are for other things than the tokens of a row")
        made = functools.cache(
            lambda n: own(**how | {"batch_size": 1, "q_length": n, "kv_length": n})
        )
        longest = made(max(self.lengths))
        if longest is not None and not isinstance(longest, Tensor):
            return refuse("its attention takes masks that are no tensors")
        if self.compiled:  # the same kind of recipe for all lengths
            longest = torch.ones((), dtype=torch.bool, device=how["device"])
        if longest is None:  # nor has any shorter one
            return None
        recipe = longest.new_zeros(()).expand(1, 1, total, total)
        self.now.masks[recipe.untyped_storage()._cdata] = recipe, made
        return recipe

    def attend(
        self,
        own: Callable[..., Any],
        module: nn.Module,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        how: dict[str, Any],
    ) -> tuple[Tensor, None]:
        """[1, T, heads, D] by the attention `own` of each sequence [1, heads, n, D] alone.

        Where it is causal, a CPU gets tokens behind a sequence as well: see `_CPU_LENGTHS`.
        """
        total = sum(self.lengths)
        if any(x.shape[0] != 1 or x.shape[2] != total for x in qkv):
            return refuse("its attention is over other things than the tokens of a row")
        self.now.attended = True
        made = self._recipe(mask)
        if qkv[0].is_cuda and self.flash:
            found = by_torch(self, qkv, mask, how)
            if found is not None:
                return found, None
        is_causal = getattr(module, "is_causal", False) and how.get("is_causal") is not False
        unit = _CPU_LENGTHS if is_causal and qkv[0].device.type == "cpu" else 1
        outputs, start = [], 0
        for n in self.lengths:
            end = next((end for end in self.now.ends if end >= start + n), total)
            piece = slice(start, min(start - -n // unit * unit, end))
            parts = [x[:, :, piece] for x in qkv]
            some = {name: _of_piece(value, total, piece) for name, value in how.items()}
            outputs.append(own(module, *parts, made(parts[0].shape[2]), **some)[0][:, :n])
            start += n
        return torch.cat(outputs, 1), None

    def by_flash_attention(
        self, own: Callable[..., Any], module: nn.Module, qkv: Any, how: dict[str, Any]
    ) -> Any:
        """The same by transformers' function for the package flash-attn, which knows lengths."""
        self.now.attended = True
        return by_flash_attention(self, own, module, qkv, how)

    def offsets(self, device: torch.device) -> Tensor:
        """int32 [sequences + 1], where each one begins, and the end."""
        if device not in self.now.offsets:
            ends = torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
            self.now.offsets[device] = ends.to(device, non_blocking=True)
        return self.now.offsets[device]

    def _recipe(self, mask: Tensor | None) -> Callable[[int], Tensor | None]:
        if mask is None:
            return lambda n: None
        found = self.now.masks.get(mask.untyped_storage()._cdata)
        if found is None or mask.shape[-2:] != found[0].shape[-2:]:
            return refuse("its class makes masks of its own")
        return found[1]


class _Remembered(torch.autograd.Function):
    """The same tensor. Backward, which comes to the last pass first, begins a pass here."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, row: PackedRow) -> Tensor:
        ctx.row, ctx.made = row, row.now
        return output.detach()  # no view: FSDP2 warns of a root that returns one

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.row.now = ctx.made
        return grads[0], None


@contextmanager
def one_sequence_per_row() -> Iterator[None]:
    """Inside, transformers does not look for packed sequences in the positions that it gets.

    It would read a value of each batch, for which the host waits for a GPU. `packed_row` knows
    where sequences begin.
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    look = getattr(masking, "find_packed_sequence_indices", None)
    if look is None:
        yield
        return
    masking.find_packed_sequence_indices = lambda positions: None
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = look


def row_of(model: nn.Module) -> PackedRow | None:
    """The row of a model whose loss knows packed rows."""
    row: PackedRow | None = getattr(model, OWNER, None)
    return row


def refuse(reason: str) -> Any:
    raise UsageError(f"data.packing: this model cannot pack: {reason}; set data.packing: false")


def _of_piece(value: Any, total: int, piece: slice) -> Any:
    """The part of an argument that belongs to a sequence: of a bias [..., T, T] its square."""
    if isinstance(value, Tensor) and value.ndim > 2 and value.shape[-2:] == (total, total):
        return value[..., piece, piece]
    return value
