"""Lower bounds on the time of an optimizer step, for given speeds."""

from __future__ import annotations

from dataclasses import dataclass

from dlora.plan.plan import Plan


@dataclass(frozen=True)
class Speeds:
    """The highest speeds of a machine; what has none (None) takes no time.

    Args:
        inside: bytes per second that a rank sends inside its node.
        between: bytes per second over a node's link, each way.
        flops: floating-point operations per second of a rank.
    """

    inside: float | None = None
    between: float | None = None
    flops: float | None = None

    @property
    def known(self) -> bool:
        """Whether any speed is known."""
        return (self.inside, self.between, self.flops) != (None, None, None)


@dataclass(frozen=True)
class StepTime:
    """Seconds of each part of a step.

    Attributes:
        compute: forward of the frozen weights, backward to their inputs, A and B, and what is
            recomputed, with every micro-batch the largest.
        inside, between: sending inside nodes, and between them.
    """

    compute: float
    inside: float
    between: float

    @property
    def overlapped(self) -> float:
        """The least with perfect overlap: the longest part."""
        return max(self.compute, self.inside, self.between)

    @property
    def serial(self) -> float:
        """The least without any overlap: the sum of the parts."""
        return self.compute + self.inside + self.between


def step_time(plan: Plan, speeds: Speeds) -> StepTime:
    """The parts of a step under a plan."""

    def seconds(amount: float, speed: float | None) -> float:
        return amount / speed if speed else 0.0

    return StepTime(
        compute=seconds(plan.flops, speeds.flops),
        inside=seconds(plan.traffic.inside, speeds.inside),
        between=seconds(plan.traffic.between, speeds.between),
    )
