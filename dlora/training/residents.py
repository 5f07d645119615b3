"""The layers that stay gathered in a run, and how they give way when memory becomes short.

    the plan       as many as fit, with the run's largest micro-batch (`dlora.plan`)
    every step     each rank says in the reduction whether its memory comes near what it may take
    any rank does  every rank frees half of the layers that are left: the least worth of them

All ranks decide by the same sum, since a layer is gathered by all of them or by none.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from dlora.plan.capacity import free_bytes
from dlora.plan.choose import Decision
from dlora.plan.plan import Plan
from dlora.plan.report import mb
from dlora.runtime.console import console
from dlora.runtime.memory import MemoryMeter
from dlora.sharding.engines.protocol import Engine


class Residents:
    """The resident layers of a run.

    Attributes:
        plan: that of the run with the layers that are resident now.
        limit: bytes of a peak from which on layers are freed; None: the plan knew of no limit.
    """

    def __init__(
        self, decision: Decision, engine: Engine, model: nn.Module, device: torch.device
    ) -> None:
        self.plan: Plan = decision.plan
        self.limit = None if decision.capacity is None else decision.capacity.nbytes
        self._holding, self._engine, self._model = decision.holding, engine, model
        self._device = device
        self._ranks = int(os.environ.get("LOCAL_WORLD_SIZE", self.plan.topology.world))
        self._is_short, self._transient, self._has_begun = False, 0, False
        self._engine.keep_gathered(model, self.plan.resident)

    def near(self, meter: MemoryMeter) -> float:
        """What this rank adds to the reduction, after backward: 1 if memory is short, else 0."""
        if not self.plan.resident:
            return 0.0
        peak = meter.recent()
        if not self._has_begun:  # loading and compiling are in the first one
            self._has_begun = True
            return 0.0
        self._transient = max(0, peak - meter.now())
        passed = self.limit is not None and peak > self.limit
        return float(passed or self._is_short)

    def give_way(self, ranks: float) -> None:
        """Free some layers if any rank was short.

        Args:
            ranks: the sum of `near` over ranks.
        """
        if not self.plan.resident:
            return
        if ranks > 0:
            kept = self.plan.resident[: len(self.plan.resident) // 2]
            freed = self.plan.resident[len(kept) :]
            before = self.plan
            self._engine.release_gathered(self._model, freed)
            self.plan = self._holding(kept)
            console.info(
                f"resident: memory is short on {ranks:.0f} rank(s): {len(freed)} layers are freed, "
                f"{mb(before.memory.resident - self.plan.memory.resident)}; {len(kept)} stay"
            )
        # All ranks are past their backward passes here, so that none holds activations.
        free = free_bytes(self._device, self._ranks)
        if free is not None and self._device.type == "cuda":  # what torch's allocator has kept
            free += torch.cuda.memory_reserved(self._device)
            free -= torch.cuda.memory_allocated(self._device)
        self._is_short = free is not None and free < self._transient
