"""One reduction per optimizer step, and the clip; with a loss scaler, a skip that ranks agree on.

    scaled loss ─> S·g of this rank ─> g ─> mean over ranks ─> S·ḡ ─> scaler: ḡ, and "inf?"

The scale S is taken out before the reduction, so that what a method adds to gradients there (the
regulariser of AdaLoRA) has its weight, and put in again for the scaler, which takes it out itself.
If the norm over all ranks is not finite, every rank's gradients become infinite: each rank's scaler
looks at its own part only, and all of them must skip the step.
"""

from __future__ import annotations

import math

import torch
from torch.amp import GradScaler
from torch.optim import Optimizer

from dlora.api import TrainedReplica


def reduce_gradients(
    replica: TrainedReplica, optimizer: Optimizer, scaler: GradScaler | None = None
) -> float:
    """Make every gradient its mean over ranks. Collective; once per optimizer step.

    Args:
        optimizer: works on `replica.parameter_groups`.
        scaler: scaled the losses; the gradients stay scaled, and its `unscale_` comes next.

    Returns:
        The 2-norm of the unscaled gradients, the same on every rank; not finite where the scaler is
        going to skip the step, of which the adapters' method has been told.
    """
    if scaler is None or not scaler.is_enabled():
        return replica.reduce_gradients().norm
    scale = scaler.get_scale()
    own = [p.grad for p in replica.named.values() if p.grad is not None]
    if own:
        torch._foreach_mul_(own, 1 / scale)
    norm = replica.reduce_gradients().norm
    if math.isfinite(norm):
        replica.gradients.mul_(scale)
    else:
        replica.gradients.fill_(math.inf)
        replica.skip_step(optimizer)
    return norm
