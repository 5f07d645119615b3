"""What a method computes and saves beside A, B and the optimizer: one class of hooks.

    dlora.attach ─> the adapter class names its state class ─> the replica makes one and calls it

    a step      before_reduce ─> one reduction ─> clip ─> optimizer.step ─> after_step ─> metrics
    a save      tensors, record, write_files
    a resume    load_record (shapes first), then load_tensors

The training loop, the replica, checkpoints, resume, metrics and reports know these members only.
Every rank calls the same ones in the same order, so that a state may use collectives in
`before_reduce` and `after_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

Tensors = Mapping[str, Mapping[str, Tensor]]  # parameter → name → what this rank stores of it


class PlannedState(NamedTuple):
    """What a method adds to the plan of one adapter.

    Attributes:
        copies: tensors of its size that the method stores for a parameter, by the parameter's name
            in the adapter.
        summed: elements of the sum over ranks that the method makes at some steps.
        summed_always: those of the sum that it makes in every step.
        working: elements that every rank has for the passes of a step, and no checkpoint.
    """

    copies: Mapping[str, int] = {}
    summed: int = 0
    summed_always: int = 0
    working: int = 0


class MethodState:
    """The state of a method that has none; others override what they need.

    A subclass is made with `(model, replica)` once the replica owns the model's adapters.
    """

    @property
    def working_bytes(self) -> int:
        """What every rank has for the passes of a step, and no checkpoint."""
        return 0

    @property
    def resized_after(self) -> int | None:
        """The step after which the method cut parameters for good; None as long as it has not.

        The plan describes the steps before it.
        """
        return None

    def before_reduce(self, tokens: int) -> None:
        """Add to this rank's gradients, which are about to be summed and divided by all tokens.

        Args:
            tokens: the weight of this rank's gradients in the mean over ranks.
        """

    def after_step(self, optimizer: Optimizer, *, skipped: bool = False) -> None:
        """React to a step of an optimizer that has trained parameters of the replica.

        Args:
            skipped: the loop left the step out, because its gradients were not finite.
        """

    def metrics(self) -> dict[str, Any]:
        """Figures of the last step for its line of `metrics.jsonl`.

        It may read from the device: it is called in steps whose line is logged or saved.
        """
        return {}

    def progress(self) -> str:
        """Text about the last step for the live line."""
        return ""

    def tensors(self) -> dict[str, Tensors]:
        """This rank's tensors for a checkpoint, by the name of their file."""
        return {}

    def record(self) -> dict[str, Any] | None:
        """What a checkpoint stores beside tensors, as JSON; each adapter class reads it as well."""
        return None

    def load_record(self, step: int, record: Any) -> None:
        """Continue after `step` with the `record` of a checkpoint, before tensors are loaded."""

    def load_tensors(self, file: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load (`<parameter>.<name>`, whole tensor) of a checkpoint's file.

        It has to consume all `tensors`: each one is broadcast when it is read.
        """
        for _ in tensors:
            pass

    def write_files(self, directory: Path, until: int) -> None:
        """Write the method's files of a run up to a step; for the rank that saves."""

    def report(self, directory: Path, log: Any, say: Callable[[str], None]) -> None:
        """End a run: add pictures to `directory` and `log.figure`, pass lines to `say`."""
