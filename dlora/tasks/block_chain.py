"""Whether a model is a chain of blocks: each one's input is what the one before returned.

Models may compute between their blocks (several streams, inputs for each layer). A pass of a few
tokens over the model on the meta device shows it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dlora.base.recomputation import CACHES, lists_of_blocks
from dlora.objectives.chunked_loss import one_sequence_per_row

_HIDDEN = "hidden_states"
_TOKENS = 8


def chained_blocks(model: Any, *, known: bool = False) -> list[nn.Module]:
    """The blocks of a model that is a chain of them, in their order; none of any other model.

    Args:
        model: a causal language model on the meta device, without adapters.
        known: whether it is known to be one; then it may be anywhere.
    """
    lists = lists_of_blocks(model)
    blocks = lists[0] if len(lists) == 1 else []
    return blocks if known or (blocks and _is_chain(model, blocks)) else []


def _is_chain(model: Any, blocks: list[nn.Module]) -> bool:
    try:
        return _follows(model, blocks)
    except Exception:  # a block's code may need values, as that of routers
        pass
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = _stand_in
        return _follows(model, blocks)
    except Exception:  # what is around the blocks does, or takes other arguments
        return False
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _stand_in(*args: Any, **kwargs: Any) -> Tensor:
    """What a block returns, without what is in it."""
    given: Tensor = args[0] if args else kwargs[_HIDDEN]
    return given.clone()


def _follows(model: Any, blocks: list[nn.Module]) -> bool:
    """Whether each block is given what the one before returned, and no cache, in a pass."""
    seen: list[tuple[Any, Any]] = []  # what each call was given, and what it returned
    outside: list[str] = []

    def note(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs.get(_HIDDEN)
        seen.append((given, output if isinstance(output, Tensor) else output[0]))
        outside.extend(name for name in CACHES if kwargs.get(name) is not None)

    hooks = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad(), one_sequence_per_row():
            ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    follows = all(
        isinstance(given, Tensor) and given is returned
        for (_, returned), (given, _) in zip(seen, seen[1:], strict=False)
    )
    return len(seen) == len(blocks) and follows and not outside
