"""What a run has forgotten of what its base knew: measured, and what becomes of the run for it.

    an evaluation  ──measure──>  NLL, KL(base‖tuned), agreement   `forget_…` of its line
    too much of it ──stop──────> a commit, and the end
                   ──rollback──> the end, as it was at the last evaluation that passed
                   ──shrink────> nothing until the last step; then the largest c·s that passes

What is decided is in `state.json` of the checkpoint, so that the same command finds it again. With
other limits it is decided anew.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from dlora.config.forget import SELF, ForgetConfig
from dlora.data import Dataset
from dlora.data.collate import collate, packed
from dlora.errors import UsageError
from dlora.lora.attach import named_adapters
from dlora.metrics.log import SHRUNK
from dlora.objectives.divergence import SUMS, Forgotten, measure
from dlora.runtime.agreement import agree
from dlora.runtime.console import console
from dlora.training.checkpointing import CheckpointManager
from dlora.training.context import RunContext
from dlora.training.evaluate import evaluating, rows_at_once
from dlora.training.reporting import due
from dlora.training.resume import restore_adapters
from dlora.training.sampled_texts import sampled_texts

KEY = "forget"  # of `state.json`, and of `stopped_by`
HALVINGS = 10  # of [0, 1], in which the scale of `shrink` is looked for


class Forgetting:
    """The measurements of a run, and its gate. The same on every rank.

    Attributes:
        measures: whether anything is.
        ended: the run has ended for it.
    """

    def __init__(self, context: RunContext, checkpoints: CheckpointManager) -> None:
        self._context, self._checkpoints = context, checkpoints
        self._section: ForgetConfig = context.config.forget
        self.measures = self._section.data is not None and context.config.output.eval_every > 0
        self._texts: Dataset | None = context.prepared.retained
        self._scales = {path: a.scaling for path, _, a in named_adapters(context.model)}
        self._state: dict[str, Any] = self._before()
        if self._section.gates:
            self._note()

    @property
    def ended(self) -> bool:
        """Whether the run has ended, now or before it was started again."""
        return "ended" in self._state

    @property
    def saves(self) -> bool:
        """Whether the evaluation that was just made may be rolled back to, so has to be saved."""
        rolls_back = self._section.gates and self._section.action == "rollback"
        return rolls_back and self._state.get("passed") == self._state.get("step")

    # -- what the loop calls ----------------------------------------------------------------------

    def look(self, step: int, *, last: bool = False) -> dict[str, Any]:
        """Measure after `step` steps, and decide; what the step's line has of it.

        `stopped_by` is in it where the run has ended.
        """
        if not self.measures:
            return {}
        found = self.measure()
        record: dict[str, Any] = found.figures()
        if not self._section.gates:
            return record
        over = exceeded(self._section, found)
        record["forget_passed"] = not over
        self._note(step=step)
        if not over:
            self._note(passed=step)
        elif step == 0:
            console.warning(f"forget: before training {over}; the first evaluation decides")
        elif self._section.action == "shrink":
            record |= self._shrink(over) if last else {}
        else:
            record |= self._end(step, over)
        return record

    def owed(self, step: int, *, last: bool = False) -> bool:
        """After a resume: make up for the evaluation of that step, if the run was lost before it.

        Returns:
            Whether the run has ended by it.
        """
        every = self._context.config.output.eval_every
        known = not self._section.gates or self._state.get("step") == step
        if step and not known and due(step, every, last=last):
            self.look(step, last=last)
        if (scale := self._state.get("scale")) is not None and last:
            self._set_scale(scale)
        elif scale is not None:
            console.info("forget: the run is longer now, and goes on with the adapter's own scale")
            self._note(scale=None)
        return self.ended

    def line(self) -> str:
        """How the run had ended."""
        return str(self._state["ended"]["line"])

    def measure(self) -> Forgotten:
        """The figures of the retained set: sums over all texts of all ranks, divided then."""
        if self._texts is None:
            assert self._section.data == SELF
            self._texts = sampled_texts(self._context)
        context, texts = self._context, self._texts
        ranks, prepared = context.ranks, context.prepared
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=ranks.device)
        micro_batches = rows_at_once(context)
        deal = prepared.dealing.holding(int(texts.lengths.max())).times(micro_batches)
        make = packed if prepared.dealing.packs else collate
        with evaluating(context, micro_batches):
            for ids in deal(range(len(texts)), texts.lengths, ranks.world)[ranks.rank]:
                batch = make([texts[i] for i in ids], prepared.pad_id).to(ranks.device)
                sums += measure(context.model, batch)
        if ranks.world > 1:
            dist.all_reduce(sums)
            dist.broadcast(sums, src=0)  # the same bits, since all ranks decide by them
        return Forgotten.of(sums)

    # -- what is decided --------------------------------------------------------------------------

    def _end(self, step: int, over: str) -> dict[str, Any]:
        """End the run after `step`; of a rollback, as it was at the last evaluation that passed."""
        record: dict[str, Any] = {"stopped_by": KEY}
        back = self._state.get("passed") if self._section.action == "rollback" else None
        line = f"after step {step} {over}: stopped (forget.action: {self._section.action})"
        if back is not None:
            line = f"after step {step} {over}: back to step {back}, where the run ends"
            record["forget_back_to"] = back
        elif self._section.action == "rollback":
            line += "; no evaluation has passed that could be restored"
        self._note(ended={"step": step, "line": line} | ({} if back is None else {"back": back}))
        console.info(f"forget: {line}")
        if back is not None:
            self._roll_back(back)
        return record

    def _roll_back(self, step: int) -> None:
        """Make a step that passed the newest checkpoint, and the adapters those of it."""

        def commit() -> tuple[Any, str]:
            try:
                return self._checkpoints.roll_back(step, {KEY: self._state}), ""
            except UsageError as error:
                raise UsageError(f"forget.action: rollback to step {step}: {error}") from None

        restore_adapters(self._context, agree(self._context.ranks, "forget/rollback", commit))

    def _shrink(self, over: str) -> dict[str, Any]:
        """Lower the scale of all adapters to the largest c·s that passes, by bisection.

        The measures are taken to grow with c; c is below one that does not pass by at most 2⁻¹⁰.
        """
        low, high, best = 0.0, 1.0, None
        if self._context.blocks is not None:  # each scale would cost graphs of its own
            self._context.blocks.switch(False)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            self._set_scale(middle)
            found = self.measure()
            if exceeded(self._section, found):
                high = middle
            else:
                low, best = middle, found
        if best is None:
            self._set_scale(1.0)
            console.warning(
                f"forget: {over}, and so does any scale down to {high:g} of its own: the adapter "
                "stays as it was trained"
            )
            return {}
        self._set_scale(low)
        self._note(scale=low)
        console.info(
            f"forget: {over}: the scale of the adapter is lowered to {low:g} of what it was, with "
            f"KL {best.kl:.4g} and NLL {best.nll:.4f} (base: {best.base_nll:.4f})"
        )
        shrunk = {f"{name}{SHRUNK}": value for name, value in best.figures().items()}
        return {"forget_scale": low, **shrunk}

    def _set_scale(self, share: float) -> None:
        for path, _, adapter in named_adapters(self._context.model):
            adapter.scaling = share * self._scales[path]

    # -- what a checkpoint has of it --------------------------------------------------------------

    @property
    def _gate(self) -> dict[str, Any]:
        """By which it is decided."""
        return asdict(self._section)

    def _before(self) -> dict[str, Any]:
        """What the run had decided before it was started again, by the same limits."""
        resumed = self._context.prepared.resumed
        found = resumed.state.get(KEY) if resumed else None
        if not isinstance(found, dict) or not self._context.continues:
            return {"gate": self._gate}
        if found.get("gate") == self._gate:
            return dict(found)
        if ended := found.get("ended"):
            console.info(
                f"forget: the run had ended: {ended['line']}; the limits are others now, so it "
                "goes on"
            )
        return {"gate": self._gate}

    def _note(self, **decided: Any) -> None:
        """Record what is decided; a new object, since a snapshot may have the old one."""
        self._state = self._state | decided
        self._context.decisions[KEY] = self._state
        if self._section.action == "rollback":
            self._checkpoints.pinned = self._state.get("passed")


def exceeded(section: ForgetConfig, found: Forgotten) -> str:
    """Which limits are exceeded, in words; "" where none is. What is no number exceeds them."""
    over = []
    if section.max_kl is not None and not found.kl <= section.max_kl:
        over.append(f"KL {found.kl:.4g} exceeds forget.max_kl: {section.max_kl:g}")
    ratio = found.nll / found.base_nll if found.base_nll else float("inf")
    if section.max_nll_ratio is not None and not ratio <= section.max_nll_ratio:
        limit = section.max_nll_ratio
        over.append(f"NLL over the base's, {ratio:.4g}, exceeds forget.max_nll_ratio: {limit:g}")
    return " and ".join(over)
