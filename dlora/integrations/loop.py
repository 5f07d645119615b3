"""A loop written by hand, with the same step, files and resume as under `Trainer`.

loop = DloraCallback(model, optimizer, scheduler=schedule, max_grad_norm=1.0)
for batch in loader:
    model(**batch).loss.backward()
    loop.step()                       # one reduction, the clip, the optimizer, the schedule
loop.save("out/step-100"); loop.load("out/step-100")
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from dlora import UsageError
from dlora.api import replica_of
from dlora.integrations import adapter, stored
from dlora.integrations.one_step import reduce_gradients
from dlora.integrations.prepared import check_names
from dlora.integrations.whole_state import WholeState

STATE = "dlora_state.safetensors"


class DloraCallback:
    """What a loop calls where a step ends, where it saves, and where it resumes.

    Args:
        model: with adapters, and sharded by `dlora.shard`.
        optimizer: made of `replica.parameter_groups`; connected here, also where its state is
            divided over ranks.
        scheduler: stepped after each step that is not skipped.
        scaler: the loss scaler of a loop in fp16, `torch.amp.GradScaler`; `scaler.scale(loss)`
            stays the loop's.
        max_grad_norm: None: gradients are not clipped.

    Raises:
        UsageError: the model has not been sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scheduler: Any = None,
        scaler: GradScaler | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        replica = replica_of(model)
        if replica is None:
            raise UsageError("DloraCallback: the model is not sharded; call dlora.shard first")
        check_names(model)
        self.model, self.replica, self.optimizer = model, replica, optimizer
        self.scheduler, self.scaler, self.max_grad_norm = scheduler, scaler, max_grad_norm
        WholeState(replica, optimizer)

    def step(self) -> float:
        """Make an optimizer step of the gradients since the last one. Collective.

        Returns:
            The norm of the gradients before the clip; not finite if the scaler skipped the step.
        """
        norm = reduce_gradients(self.replica, self.optimizer, self.scaler)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.max_grad_norm:
            self.replica.clip(self.max_grad_norm, norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.scheduler is not None and (self.scaler is None or math.isfinite(norm)):
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.replica.zero_grad()
        return norm

    def save(self, directory: str | Path, **beside: Any) -> None:
        """Write the adapter in PEFT's layout, and what a resume needs. Collective.

        Args:
            beside: of the loop's own, numbers and text: the step, say; `load` returns them.
        """
        directory, topology = Path(directory), self.replica.topology
        directory.mkdir(parents=True, exist_ok=True)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "beside": beside,
        }
        stored.write_random(directory, topology.rank)
        if topology.rank == 0:
            adapter.save(self.model, self.replica, directory)
            stored.write(directory / STATE, state)
        if topology.world > 1:
            dist.barrier()  # whoever reads it next finds all of it

    def load(self, directory: str | Path) -> dict[str, Any]:
        """Put back what `save` wrote; every rank calls it. Returns what it was given `beside`.

        On another number of ranks, random states stay as they are.

        Raises:
            UsageError: a file is missing, is damaged, or does not fit; it names the file.
        """
        directory, topology = Path(directory), self.replica.topology
        adapter.load(self.model, self.replica, directory)
        state = stored.read(directory / STATE)
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("scheduler", "scaler"):
            part = getattr(self, name)
            if (part is None) != (state[name] is None):
                has, lacks = ("loop", "file") if part is not None else ("file", "loop")
                raise UsageError(f"{directory / STATE}: the {has} has a {name}, the {lacks} none")
            if part is not None:
                part.load_state_dict(state[name])
        stored.read_random(directory, topology.rank, topology.world)
        return state["beside"]
