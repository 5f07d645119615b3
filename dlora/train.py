"""`torchrun -m dlora.train --config FILE`: one run, from the command line to the adapter.

The loop reads top to bottom:  1 a step's sequences, dealt out over ranks   2 forward and backward
3 one reduction of the gradients   4 clip, schedule, optimizer   5 watch, log, save   6 stop?
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

from dlora.config.load import Config
from dlora.data.batches import Batches
from dlora.data.collate import Batch
from dlora.hooks import NO_HOOKS, Hooks
from dlora.lora.attach import attachment_of
from dlora.lora.dropout import SampleKeys
from dlora.metrics.progress import StepDisplay
from dlora.objectives.router_loss import whole_loss
from dlora.optim.schedule import lr_factor, set_lr
from dlora.plan.report import lines_of
from dlora.runtime.console import console
from dlora.runtime.determinism import deterministic
from dlora.runtime.exit_status import exit_with
from dlora.runtime.failure import reported
from dlora.runtime.memory import MemoryMeter, trim_after_step
from dlora.runtime.peer_watch import PeerWatch
from dlora.runtime.ranks import Ranks
from dlora.runtime.run_lock import RunLock
from dlora.runtime.stop_signals import STOP_FLAGS, StopRequest, exit_status
from dlora.sharding.replica.step_scalars import Reduced
from dlora.together.prepare import prepare_together
from dlora.together.run import TogetherRun
from dlora.training.build import batches_of, build
from dlora.training.checkpointing import CheckpointManager
from dlora.training.evaluations import Evaluations
from dlora.training.finish import finish
from dlora.training.prepare import Preparation, prepare
from dlora.training.rates import rates
from dlora.training.record import failed, stopped
from dlora.training.reporting import due, has_reader, open_log, start_sinks, step_figures
from dlora.training.resume import resume
from dlora.training.startup import enter, import_late_ones, lock_output, prepared
from dlora.training.watchdogs import FiniteWatch, HangWatch, UnusedWatch, beat_in_passes, is_finite


def main(argv: list[str], hooks: Hooks = NO_HOOKS) -> int:
    """The command; returns the exit status."""
    ranks, options = enter(argv, prog="dlora.train", first=hooks.enter)
    if options is None:
        return 0
    config = options.config
    if options.check:
        return check(config, ranks)
    lock = lock_output(config, ranks)  # nothing is written or fetched before
    try:
        import_late_ones(config)
        meter = MemoryMeter()  # counts from here: after imports, before data and weights
        preparation = planned(config, ranks)
        with reported(ranks), deterministic(config.train.deterministic):
            ranks.join(config.sharding.loading_timeout_seconds)
            run = TogetherRun if config.adapters else Run
            return run(config, ranks, preparation, meter, lock, hooks).run()
    finally:
        lock.release()


def check(config: Config, ranks: Ranks) -> int:
    """`--check`: configuration, data and plan, without writing anything, so without a lock."""
    planned(config, ranks, check=True)
    console.info("configuration, data and plan are valid; nothing was trained (--check)")
    ranks.leave()
    return 0


def planned(config: Config, ranks: Ranks, *, check: bool = False) -> Any:
    """The preparation of a run, its plan printed."""
    work = prepare_together if config.adapters else prepare
    preparation: Any = prepared(config, ranks, work, check=check)
    is_open = config.sharding.base == "auto"
    console.info("\n".join(lines_of(preparation.decision, is_open=is_open)))
    return preparation


class Run:
    """One run: what the loop works on, set up once, and the loop."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        preparation: Preparation,
        meter: MemoryMeter,
        lock: RunLock,
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        config = preparation.config  # in which nothing is `auto` that the machines decide
        self.config, self.ranks, self.prepared = config, ranks, preparation
        self.meter, self.lock, self.directory = meter, lock, config.output.directory
        self.peers = PeerWatch(ranks)
        self.hooks = hooks.within(self.peers.waiting)
        # Before weights are read, so that a signal stops that too.
        stop_path = config.output.stop_path if ranks.main else None
        self.stop = StopRequest(stop_path, self.hooks.should_stop)
        self.losses = FiniteWatch(self.directory / "nonfinite.json" if ranks.main else None)
        self.unused = UnusedWatch(config.train.allow_unused, preparation.unreached)
        self.hang = HangWatch(config.sharding.timeout_seconds)
        with self.peers.watching(config.sharding.loading_timeout_seconds):
            self.sinks = start_sinks(config, ranks, preparation)
            self.context = build(config, ranks, preparation, lock, self.hooks)
            self.start = resume(self.context)
        self.model, self.replica = self.context.model, self.context.replica
        self.objective = self.context.objective
        attachment_of(self.model).stream.announce = console.info
        self.optimizer = self.context.optimizer
        self.total_steps = preparation.sampler.total_steps
        self.rates = rates(config, ranks, preparation)
        self.records: list[dict[str, Any]] = []  # of the steps since this start
        self.checkpoints = CheckpointManager(self.context, self.start)
        self.evaluations = Evaluations(self.context, self.checkpoints, self.start)
        beat_in_passes(self.model, (self.stop, self.hang, self.peers))

    def run(self) -> int:
        """`train`, with a commit where a peer is lost; returns the exit status."""
        checkpoints, limits = self.checkpoints, self.config.sharding
        with self.peers.watching(limits.loading_timeout_seconds):
            self.ranks.loaded()
        with self.peers.watching(limits.timeout_seconds, checkpoints.commit_alone):
            return checkpoints.guard(self.train, self.peers)

    def train(self) -> int:
        """The loop; returns the exit status."""
        config = self.config
        replica, stop, checkpoints = self.replica, self.stop, self.checkpoints
        residents = self.context.residents
        self.evaluations.take_up()
        if self.start == self.total_steps or self.evaluations.over:
            return self.evaluations.finish_again()
        log, status, trouble = self.open_log(), None, None
        done, last = self.start, False
        ended: bool = self.evaluations.over  # by one that `begin` made up for
        display = StepDisplay(self.total_steps, self.start, self.ranks.main)
        committing = stop.committing(checkpoints.commit_alone)
        batches = self.batches()
        with checkpoints.writing(), display, committing, self.hang.watching(), batches:
            for step in () if ended else range(self.start, self.total_steps):
                began = time.perf_counter()

                # 1  the step's sequences, the same whatever the world size, and this rank's part
                ids, mine = batches.step(step)

                # 2  forward and backward, summed over this rank's targets, or its pairs
                sums, weight = self.passes(step, mine)

                # 3  one reduction: gradients become the mean over all targets (pairs) of all ranks
                checkpoints.before_change()
                scalars: dict[str, Any] = {**sums, "save": float(self.hooks.should_save())}
                scalars["near"] = residents.near(self.meter)
                scalars |= zip(STOP_FLAGS, stop.poll(), strict=True)
                reduced = replica.reduce_gradients(weight, scalars=scalars, each=self.meter.peak())

                # 4  clip, schedule, step (after which the method's state follows)
                loss, norm = reduced.scalars["loss"] / max(reduced.tokens, 1), reduced.norm
                replica.clip(config.optimizer.max_grad_norm or math.inf, norm)
                lr = self.set_lr(step)
                if is_finite(loss, norm):
                    self.optimizer.step()
                else:
                    replica.skip_step(self.optimizer)
                replica.zero_grad()
                residents.give_way(reduced.scalars["near"])

                # 5  watch, log, save
                done, last = step + 1, step + 1 == self.total_steps
                if last:
                    replica.audit()  # as the replica does by itself at every 10th reduction
                self.lock.check()
                trim_after_step(self.ranks.device)
                seconds = time.perf_counter() - began
                record: dict[str, Any] = {"step": done, "loss": loss, "grad_norm": norm, "lr": lr}
                record |= self.figures(done, ids, reduced, seconds)
                checkpoints.snapshot(done, record)
                self.records.append(record)
                trouble = self.trouble(record, ids)
                stops = [reduced.scalars[flag] for flag in STOP_FLAGS]
                status = 1 if trouble else exit_status(stops)
                evaluated = due(done, self.context.eval_every, last=last)
                if evaluated:
                    record |= self.evaluations.see(done, last=last)
                ended = "stopped_by" in record
                if evaluated or due(done, config.output.log_every):
                    log.write(record)
                    display.update(record, replica.method.progress())
                asked = status is not None or reduced.scalars["save"] > 0
                asked = asked or (evaluated and self.evaluations.saves)
                if asked or due(done, config.output.save_every, last=last):
                    checkpoints.save(done, record)
                if evaluated:
                    self.evaluations.saved()

                # 6  a signal on any rank, or trouble, stops all of them here, after the commit
                if trouble or ended or (status is not None and not last):
                    break
        if (last or ended) and self.ranks.main:
            checkpoints.write_method_files(done)
            replica.method.report(self.directory, log, console.info)
        log.close()
        if trouble:
            return failed(self.context, done, trouble)
        if ended and not last:
            self.evaluations.told(done)
        if status is None or last or ended:
            self.losses.close()
            return finish(self.context, checkpoints, self.records)
        return stopped(self.context, done, stop.cause, status)

    # -- what the loop asks for -----------------------------------------------------------------

    def open_log(self) -> Any:
        """Open the metrics' log; before a fresh run, print samples and log the held-out loss."""
        log = open_log(self.context, self.start, self.sinks)
        self.evaluations.begin(log)
        self.replica.zero_grad()
        self.replica.reductions = self.start  # audits fall on the same steps as without a stop
        self.replica.wire.take()
        return log

    def batches(self) -> Batches:
        """This rank's micro-batches."""
        return batches_of(self.prepared, self.ranks, pinned=self.ranks.device.type == "cuda")

    def passes(self, step: int, batches: Iterator[Batch]) -> tuple[dict[str, Any], int]:
        """Forward and backward of this rank's micro-batches: sums, and their weight in a mean."""
        sums, weight = dict[str, Any](places=0, targets=0), 0
        with attachment_of(self.model).values.shared():
            for batch in batches:
                batch = batch.to(self.ranks.device)
                with self.sample_keys(step, batch):
                    summed = self.objective.loss(self.model, batch)
                    whole, reported = whole_loss(self.model, summed, batch.weight)
                    whole.backward()
                self.checkpoints.look()
                reported |= getattr(self.objective, "reported", {})
                for name, value in reported.items():
                    sums[name] = sums.get(name, 0.0) + value
                weight += batch.weight
                sums["targets"] += batch.num_targets
                sums["places"] += batch.places
        return sums, weight

    def figures(self, step: int, ids: Any, reduced: Reduced, seconds: float) -> dict[str, Any]:
        """The figures of a step beside its loss, for the metrics."""
        is_read = has_reader(self.config.output, step, reduced.scalars, self.total_steps)
        return {
            **step_figures(self.context, self.objective, self.rates, ids, reduced, seconds),
            **(self.replica.method.metrics() if is_read else {}),
        }

    def trouble(self, record: dict[str, Any], ids: Any) -> str | None:
        """Why the run has to end after this step, or None."""
        found = self.losses.see(record, ids)
        return found or self.unused.see(self.replica.named, self.replica.present)

    def set_lr(self, step: int) -> float:
        """Set the learning rate of a step, counted from 0; returns it."""
        optimizer = self.config.optimizer
        factor = lr_factor(optimizer.schedule, step, self.total_steps, optimizer.warmup_ratio)
        return set_lr(self.optimizer, factor)

    def sample_keys(self, step: int, batch: Batch) -> Any:
        """Inside, dropout masks depend on the sequences of `batch`, not on the rank."""
        row = batch.input_ids.shape[1] if batch.packed else 0
        keys = SampleKeys(self.config.train.seed, step, batch.ids, batch.lengths, row)
        return attachment_of(self.model).stream.keyed(keys)


if __name__ == "__main__":
    exit_with(main)
