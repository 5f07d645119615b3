"""What a run does at its evaluations, and what they decide: the end before its last step.

    held-out figures  ──`selection`──> the best adapter is kept; none better for long: the end
    what is forgotten ──`forgetting`─> its gate: the end, a step back, or a smaller scale

`stopped_by` in the line of a step names what ended the run there.
"""

from __future__ import annotations

from typing import Any

from dlora.metrics.log import SHRUNK
from dlora.runtime.console import console
from dlora.training.best import keep, reconcile, see, take_up
from dlora.training.checkpointing import CheckpointManager
from dlora.training.context import RunContext
from dlora.training.evaluate import evaluate, held_out, print_samples
from dlora.training.finish import save_again
from dlora.training.forgetting import Forgetting
from dlora.training.reporting import RunLog


class Evaluations:
    """The evaluations of a run of one adapter; the same on every rank.

    Args:
        start: the step from which the run goes on.
    """

    def __init__(self, context: RunContext, checkpoints: CheckpointManager, start: int) -> None:
        self._context, self._checkpoints, self._start = context, checkpoints, start
        self._forgetting = Forgetting(context, checkpoints)
        self._has_data = context.prepared.eval is not None

    @property
    def over(self) -> bool:
        """Whether one of them has ended the run."""
        return self._context.selection.over or self._forgetting.ended

    @property
    def saves(self) -> bool:
        """Whether the one that was just made has to be saved."""
        return self.over or self._context.selection.improved or self._forgetting.saves

    def take_up(self) -> None:
        """Make those up that the run was lost before, of held-out figures; collective."""
        take_up(self._context, self._start)

    def begin(self, log: RunLog) -> None:
        """Begin where the run begins or goes on, once its log is open; collective."""
        context = self._context
        if self._start == 0:
            print_samples(context, "before training")
            if context.eval_every:
                figures = self._before()
                log.write(figures)
                if self._forgetting.saves:
                    self._checkpoints.save(0, figures)
        reconcile(context, self._start)
        if self._start:
            self._forgetting.owed(self._start)

    def see(self, step: int, *, last: bool) -> dict[str, Any]:
        """Evaluate after `step` steps; collective.

        Returns:
            What the step's line has of it. Where the scale of the adapter was lowered, `…_shrunk`
            are the figures afterwards.
        """
        found: dict[str, Any] = see(self._context, step) if self._has_data else {}
        found |= self._forgetting.look(step, last=last)
        if "forget_scale" in found and self._has_data:
            after = held_out(self._context)
            found |= {f"{name}{SHRUNK}": value for name, value in after.items()}
        return found

    def saved(self) -> None:
        """After the save of an evaluation: put the best adapter in its place."""
        if self._context.selection.improved:
            keep(self._context, self._checkpoints)

    def told(self, step: int) -> None:
        """Say which evaluations ended the run after `step`; what is forgotten has said it."""
        if self._context.selection.over:
            why = self._context.selection.why
            console.info(f"stopped early after step {step}: {why}")

    def finish_again(self) -> int:
        """Write the results of a run that is finished; returns the exit status.

        It may have ended between its last files.
        """
        context, forgetting, step = self._context, self._forgetting, self._start
        early = forgetting.ended or forgetting.owed(step, last=True)
        whys = [context.selection.why] if context.selection.over else []
        whys += [forgetting.line()] if early else []
        total = context.prepared.sampler.total_steps
        line = "; ".join([f"the run is already finished: step {step} of {total}", *whys])
        console.info(line)
        if context.continues:
            reconcile(context, step)
        return save_again(context, self._checkpoints)

    def _before(self) -> dict[str, Any]:
        figures: dict[str, Any] = {"step": 0}
        if self._has_data:
            figures |= evaluate(self._context)
            console.info(f"held-out loss before training: {figures['eval_loss']:.4f}")
        return figures | self._forgetting.look(0)
