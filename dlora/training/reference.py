"""What a policy is compared with, decided by how its adapter began.

a fresh adapter                     W0 with the adapter off
the adapter at `adapter.path`       a frozen copy of what it was then, on every rank and in
                                    checkpoints; or W0, with `dpo.reference: base`
"""

from __future__ import annotations

from torch import nn

from dlora.config.load import Config
from dlora.errors import UsageError
from dlora.methods.trained_replica import TrainedReplica
from dlora.objectives.reference import reference_of
from dlora.plan.objective import copies_adapter
from dlora.plan.workload import Workload
from dlora.sharding.topology import Placement
from dlora.tasks import Task
from dlora.training.find_checkpoint import ResumePoint


def reference_line(
    config: Config, task: Task, skeleton: nn.Module, resumed: ResumePoint | None
) -> str:
    """What the reference is and how it is computed, in a line; empty where there is none."""
    how = task.reference(skeleton)
    if not how:
        return ""
    what = "W0 with the adapter off"
    if copies_adapter(config, resumed.settings if resumed else None):
        what = "a frozen copy of the adapter at adapter.path"
    passes = {
        "joined": "in the policy's pass: each block computes for both, so W0 is gathered once",
        "apart": "in a pass of its own: adapters lie outside of the blocks, or the model computes "
        "between them",
    }
    return f"train.objective: {config.train.objective}: the reference is {what}, {passes[how]}"


def check_reference(workload: Workload, placement: Placement) -> None:
    """Check that an engine can compute the reference as the plan says.

    Raises:
        UsageError: DeepSpeed would have to follow a pass without a backward between two with one,
            and gathers then more than its trace, and the plan, know of.
    """
    if workload.reference == "apart" and placement.engine == "zero3" and placement.shard_size > 1:
        raise UsageError(
            "sharding.engine: zero3 cannot compute a reference in a pass of its own, which it has "
            "where adapters lie outside of the blocks, or the model computes between them; set "
            "sharding.engine: fsdp2"
        )


def freeze_reference(
    config: Config, resumed: ResumePoint | None, model: nn.Module, replica: TrainedReplica
) -> None:
    """Copy the trained tensors as they are, where the reference is their copy.

    Of a resumed run the checkpoint has them: `TrainedReplica.load_reference`.
    """
    if copies_adapter(config, resumed.settings if resumed else None):
        replica.reference = {name: p.detach().clone() for name, p in replica.named.items()}
        reference_of(model).copies = replica.reference
