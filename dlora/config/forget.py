"""The section `forget`: what the base knew, measured while an adapter learns something else."""

from dataclasses import dataclass
from typing import Literal

from dlora.registry import option

SELF = "self"  # of `forget.data`: texts that the base samples


@dataclass(frozen=True, kw_only=True)
class ForgetConfig:
    """What the base may forget: a retained set, and a gate at each evaluation."""

    data: str | list[str | dict[str, str | float]] | dict[str, str | float] | None = option(
        None,
        "a retained set, as data.eval, in the format of data.train; self: texts that the base "
        "samples; null: nothing is measured",
    )
    texts: int = option(64, "texts that the base samples", ge=2, when={"data": SELF})
    text_tokens: int = option(64, "tokens of each of them", ge=2, when={"data": SELF})
    max_kl: float | None = option(
        None, "most KL(base, tuned), in nats per token of the retained set; null: any", gt=0
    )
    max_nll_ratio: float | None = option(
        None, "most NLL of the retained set over that of the base; null: any", ge=1
    )
    action: Literal["stop", "rollback", "shrink"] = option(
        "stop",
        "where an evaluation exceeds one of these: stop, rollback to the last evaluation that did "
        "not and end, or shrink the scale of the adapter at the end of the run",
    )

    @property
    def gates(self) -> bool:
        """Whether anything can exceed a limit."""
        return self.data is not None and (self.max_kl, self.max_nll_ratio) != (None, None)
