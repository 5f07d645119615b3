"""The figures of a step, of each adapter and of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dlora.config.load import Config
from dlora.data import batch_hash
from dlora.data.collate import Batch
from dlora.runtime.ranks import Ranks
from dlora.sharding.replica.step_scalars import Reduced
from dlora.together.member import Member
from dlora.together.prepare import JointPreparation
from dlora.training.rates import rates
from dlora.training.reporting import has_reader

_SHOWN = 6  # adapters whose losses the live line has


@dataclass
class Sums:
    """Over a rank's micro-batches of one adapter: Σ loss, target tokens, places."""

    loss: Any = 0.0
    tokens: int = 0
    places: int = 0

    def add(self, batch: Batch, loss: Tensor) -> None:
        """Add a micro-batch."""
        self.loss = self.loss + loss
        self.tokens += batch.num_targets
        self.places += batch.places

    @property
    def scalars(self) -> dict[str, Any]:
        """What is summed over ranks beside the gradients."""
        return {"places": self.places, "loss": self.loss}


class Figures:
    """Makes the lines of `metrics.jsonl`."""

    def __init__(self, config: Config, ranks: Ranks, prepared: JointPreparation) -> None:
        self._rates = {name: rates(config, ranks, own) for name, own in prepared.members.items()}

    @staticmethod
    def of(member: Member, step: int, ids: Any, reduced: Reduced, lr: float) -> dict[str, Any]:
        """One adapter's figures of a step, as in a run of it alone."""
        data, targets = member.prepared.train, reduced.tokens
        all_tokens = int(sum(data.lengths[i] for i in ids))
        return {
            "step": step,
            "adapter": member.name,
            "loss": reduced.scalars["loss"] / max(targets, 1),
            "grad_norm": reduced.norm,
            "lr": lr,
            "tokens": targets,
            "all_tokens": all_tokens,
            "padding": 1 - all_tokens / max(reduced.scalars["places"], all_tokens),
            "batch_hash": batch_hash(ids),
        }

    def complete(
        self,
        running: Sequence[Member],
        lines: dict[str, dict[str, Any]],
        common: Reduced,
        seconds: float,
        wire: int,
    ) -> None:
        """Add to each line what all have in common, rates by the step's seconds, and what its
        method says where somebody reads it."""
        for member in running:
            line, output = lines[member.name], member.config.output
            line |= self._rates[member.name].of(line["tokens"], line["all_tokens"], seconds)
            line |= {"peak_memory_bytes": max(common.each), "wire_bytes": wire}
            if has_reader(output, line["step"], common.scalars, member.total_steps):
                line |= member.context.replica.method.metrics()

    @staticmethod
    def progress(lines: Mapping[str, Mapping[str, Any]]) -> str:
        """Each adapter's loss, for the live line."""
        shown = [f"{name} {line['loss']:.4f}" for name, line in list(lines.items())[:_SHOWN]]
        more = len(lines) - _SHOWN
        return "  ".join([*shown, *([f"and {more} more"] if more > 0 else [])])


def joint_record(step: int, lines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A step's figures over all adapters: rates are sums, the loss is the mean over tokens."""
    tokens = sum(line["tokens"] for line in lines.values())
    first = next(iter(lines.values()))
    summed = ("tokens", "all_tokens", "tokens_per_second", "all_tokens_per_second")
    return {
        "step": step,
        "loss": sum(line["loss"] * line["tokens"] for line in lines.values()) / max(tokens, 1),
        **{name: sum(line[name] for line in lines.values()) for name in summed},
        "step_seconds": first["step_seconds"],
        "peak_memory_bytes": first["peak_memory_bytes"],
        "wire_bytes": first["wire_bytes"],
        "adapters": {name: dict(line) for name, line in lines.items()},
    }
