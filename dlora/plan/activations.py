"""What a micro-batch takes: its figures, and an estimate of them where a model cannot be traced."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from dlora.base.quantize import FrozenMatrix, frozen_matrices
from dlora.config.recompute import Recompute
from dlora.lora.variants import LoraAdapter
from dlora.objectives.chunked_loss import chunk_rows
from dlora.sharding.engines.gather_groups import block_lists
from dlora.tasks import CAUSAL, Task

_COPIES = 5  # of a chunk of float32 logits, while its gradient is computed


@dataclass(frozen=True)
class Trace:
    """Bytes and operations of one micro-batch.

    Attributes:
        saved: alive between forward and backward.
        blocks: most alive at one time, outside of the loss.
        loss: most alive while output head and loss are computed.
        flops: of forward and backward, with what is recomputed.
        offloaded: in host memory between forward and backward.
        estimated: why the figures are estimated from shapes alone; empty where they are traced.
    """

    saved: int
    blocks: int
    loss: int
    flops: int
    offloaded: int = 0
    estimated: str = ""


def estimate(
    skeleton: Any,
    tokens: int,
    checkpointing: Recompute,
    reason: str,
    targets: int | None = None,
    device: str = "cpu",
    task: Task = CAUSAL,
) -> Trace:
    """Estimate the figures of a micro-batch of `tokens` tokens from shapes alone.

    Every weight [.., out, in] of a block saves its input and its output, which for a Llama is 0.9
    of what is saved. The stacked weights of experts count for as many experts as see a token.

    Args:
        checkpointing: which blocks recompute their activations.
        reason: why the model was not traced, for `Trace.estimated`.
        targets: tokens that are targets; None: all of them.
        device: the type of device that it runs on.
        task: what the model is trained to do.
    """
    head = task.head(skeleton)
    experts = getattr(skeleton.config, "num_experts_per_tok", None) or 1
    blocks = [b for p in block_lists(skeleton) for b in skeleton.get_submodule(p).children()]
    matrices = [list(frozen_matrices(block)) for block in blocks]
    each = [sum(_saved_by(matrix, experts) for matrix in block) for block in matrices]
    weights = sum(
        math.prod(matrix.shape[-2:]) * (experts if len(matrix.shape) > 2 else 1)
        for block in matrices
        for matrix in block
    )
    transient = max((matrix.transient for block in matrices for matrix in block), default=0)
    trained = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)
    head_size = sum(p.numel() for p in head.parameters())
    widest: Any = max(head.parameters(), key=lambda p: p.ndim)
    hidden = tokens * min(widest.shape) * widest.element_size()
    rows = min(chunk_rows(max(widest.shape), device), tokens if targets is None else targets)
    chunk = 4 * max(widest.shape) * rows
    beside = [_kept_by_adapters(block) * widest.element_size() for block in blocks]
    each = [matrices + kept for matrices, kept in zip(each, beside, strict=True)]
    again = each[:: checkpointing.every] if checkpointing else []
    inputs = len(again) * hidden
    kept = tokens * (sum(each) - sum(again)) + (0 if checkpointing.offload else inputs)
    share = len(again) / len(each) if each else 0
    return Trace(
        saved=kept,
        blocks=kept + tokens * max(each, default=0) + transient,
        loss=kept + 3 * hidden + _COPIES * chunk,
        flops=round(tokens * ((4 + 2 * share) * weights + 4 * head_size + 6 * trained)),
        offloaded=inputs if checkpointing.offload else 0,
        estimated=reason,
    )


def _kept_by_adapters(block: nn.Module) -> int:
    """Elements per token of the outputs that adapters keep."""
    adapters = [module for module in block.modules() if isinstance(module, LoraAdapter)]
    return sum(adapter.lora_B.shape[0] for adapter in adapters if adapter.keeps_output)


def _saved_by(weight: FrozenMatrix, experts: int) -> int:
    """Bytes per token of its input and its output."""
    times = experts if len(weight.shape) > 2 else 1
    return times * sum(weight.shape[-2:]) * weight.dtype.itemsize
