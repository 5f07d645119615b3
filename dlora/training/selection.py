"""Which evaluation of a run was the best, and whether they have stopped getting better.

    output.keep_best        better than all before by its figure: the adapter is kept
    output.early_stopping   not better in `patience` evaluations, one after the other: the run ends

Both count evaluations of optimizer steps, not the one before training; a figure that is no number
is never better. What was seen goes into checkpoints. A resumed run whose checkpoint was written
before the evaluation of its step (a snapshot of a lost run) makes that evaluation again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dlora.config.evaluations import mode_of
from dlora.config.load import Config
from dlora.errors import UsageError

STATE = "evaluations"  # the key in `state.json`
STOPPED_BY = "early_stopping"


@dataclass
class Followed:
    """A figure over the evaluations of a run.

    Attributes:
        mode: `min` or `max`, which is better.
        best, step: the best value so far, and of which step it is; None: there is none.
        since: evaluations after it, none of them better.
    """

    metric: str
    mode: str
    best: float | None = None
    step: int | None = None
    since: int = 0

    def see(self, step: int, value: float) -> bool:
        """Take the figure of an evaluation; whether it is the best so far."""
        is_better = math.isfinite(value) and (
            self.best is None or (value < self.best if self.mode == "min" else value > self.best)
        )
        if is_better:
            self.best, self.step, self.since = value, step, 0
        else:
            self.since += 1
        return is_better

    def load(self, state: Any) -> None:
        """Take over the state of a run that followed the same figure, and none of another's.

        Raises:
            UsageError: no run writes that.
        """
        found = asdict(self) | dict(state if isinstance(state, Mapping) else {"a": "value"})
        types = {"best": float | int | None, "step": int | None, "since": int}
        good = found.keys() == asdict(self).keys() and all(
            isinstance(found[name], kind) and not isinstance(found[name], bool)
            for name, kind in types.items()
        )
        if not good:
            raise UsageError(f"state.json: {STATE}: {state!r} is nothing that a run writes")
        if (found["metric"], found["mode"]) == (self.metric, self.mode):
            self.best, self.step, self.since = found["best"], found["step"], found["since"]


@dataclass
class Selection:
    """What a run makes of its evaluations.

    Attributes:
        best, patient: of the two options, where they are set.
        patience: evaluations without a better one that end the run.
        seen: the step of the last evaluation.
        improved: whether that one is the best so far.
    """

    best: Followed | None = None
    patient: Followed | None = None
    patience: int = 0
    seen: int = 0
    improved: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, config: Config) -> Selection:
        """That of a run that begins."""
        made = cls()
        output = config.output
        if output.keep_best is not None:
            metric = output.keep_best["metric"]
            made.best = Followed(metric, mode_of(config, dict(output.keep_best)))
        if output.early_stopping is not None:
            metric = str(output.early_stopping["metric"])
            made.patient = Followed(metric, mode_of(config, {"metric": metric}))
            made.patience = int(output.early_stopping["patience"])
        return made

    @property
    def acts(self) -> bool:
        """Whether any of the options is set."""
        return self.best is not None or self.patient is not None

    @property
    def over(self) -> bool:
        """Whether the run ends early."""
        return self.patient is not None and self.patient.since >= self.patience

    @property
    def why(self) -> str:
        """The line about a run that ends early."""
        found = self.patient
        assert found is not None
        best = f" than {found.best:.4f} (step {found.step})" if found.best is not None else ""
        return (
            f"{found.metric} was not better{best} in {found.since} evaluations "
            "(output.early_stopping)"
        )

    def see(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of an evaluation, which are the same on every rank."""
        self.seen, self.improved = step, False
        if self.best is not None:
            self.improved = self.best.see(step, figures[self.best.metric])
        if self.patient is not None:
            self.patient.see(step, figures[self.patient.metric])

    def state(self) -> dict[str, Any]:
        """What a checkpoint has of it."""
        if not self.acts:
            return {}
        parts = {"best": self.best, "patient": self.patient}
        return {STATE: {"seen": self.seen} | {n: asdict(p) for n, p in parts.items() if p}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint's `state.json` has.

        Raises:
            UsageError: it is nothing that a run writes.
        """
        found = state.get(STATE, {})
        if not isinstance(found, dict) or not isinstance(found.get("seen", 0), int):
            raise UsageError(f"state.json: {STATE}: {found!r} is nothing that a run writes")
        self.seen = found.get("seen", 0)
        for name, part in (("best", self.best), ("patient", self.patient)):
            if part is not None and name in found:
                part.load(found[name])
