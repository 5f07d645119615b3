"""`torchrun -m dlora.train --config FILE`: one run, from the command line to the adapter.

The loop reads top to bottom:  1 a step's sequences, dealt out over ranks   2 forward and backward
3 one reduction of the gradients   4 clip, schedule, optimizer   5 look, log, save   6 stop?
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from dlora.adapters.save_load import save_adapter
from dlora.config.load import Config
from dlora.data import batch_hash, deal
from dlora.data.collate import Batch, collate
from dlora.hooks import NO_HOOKS, Hooks
from dlora.lora.attach import attachment_of
from dlora.lora.dropout import SampleKeys, seed_of
from dlora.metrics.log import SilentLog, held_out_line
from dlora.metrics.progress import StepDisplay
from dlora.optim.schedule import lr_factor, set_lr
from dlora.plan.measured import measure
from dlora.plan.report import comparison, lines_of
from dlora.runtime.exit_status import exit_with
from dlora.runtime.memory import MemoryMeter, trim, without_holes
from dlora.runtime.ranks import Runtime
from dlora.runtime.run_lock import locked
from dlora.runtime.stop_signals import StopRequest, exit_status
from dlora.training.build import build, build_optimizer, objective_of
from dlora.training.checkpointing import RESUMES, CheckpointManager
from dlora.training.evaluate import held_out_loss, sample_answers
from dlora.training.find_checkpoint import output_directory, stop_file
from dlora.training.prepare import Preparation
from dlora.training.resume import open_directory, resume
from dlora.training.startup import enter, import_late_ones, prepared
from dlora.training.watchdogs import FiniteWatch, HangWatch, UnusedWatch, is_finite

TRIM_EVERY = 10  # optimizer steps between two returns of freed host memory


def main(argv: list[str], hooks: Hooks = NO_HOOKS) -> int:
    """The command; returns the exit status."""
    runtime, options = enter(argv, prog="dlora.train", first=hooks.enter)
    if options is None:
        return 0
    config = options.config
    import_late_ones(config)
    meter = MemoryMeter()  # counts from here: after imports, before data and weights
    preparation = prepared(config, runtime)
    runtime.say("\n".join(lines_of(preparation.decision, is_open=config.sharding.base == "auto")))
    if options.check:
        runtime.say("configuration, data and plan are right; nothing was trained (--check)")
        runtime.leave()
        return 0
    lock = locked(output_directory(config), runtime)
    try:
        with runtime.telling():
            runtime.join()
            return Run(config, runtime, preparation, meter, hooks).survive()
    finally:
        lock.release()


class Run:
    """One run: what the loop works on, set up once, and the loop."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        preparation: Preparation,
        meter: MemoryMeter,
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        self.hooks = hooks
        self.config, self.runtime, self.prepared = config, runtime, preparation
        self.directory = output_directory(config)
        self.meter = meter
        # From here on, so also while weights are read.
        self.stop = StopRequest(stop_file(config) if runtime.main else None, hooks.should_stop)
        self.losses = FiniteWatch(
            runtime.say, self.directory / "nonfinite.json" if runtime.main else None
        )
        self.unused = UnusedWatch(allowed=config.train.allow_unused)
        self.hang = HangWatch(config.sharding.timeout_seconds)
        if config.sharding.memory_budget_gb is not None and runtime.device.type == "cpu":
            without_holes()
        torch.manual_seed(config.train.seed)
        self.objective = objective_of(config)
        self.model, self.replica = build(config, runtime, preparation)
        self.optimizer = build_optimizer(config, runtime, preparation, self.replica)
        self.total_steps = preparation.sampler.total_steps
        self.records: list[dict[str, Any]] = []  # of the steps of this start
        self.start = resume(runtime, preparation, self.replica, self.optimizer)
        saved = config, runtime, preparation, self.replica, self.optimizer
        self.keeper = CheckpointManager(*saved, start=self.start, hooks=hooks)
        self.model.register_forward_pre_hook(lambda *_: self.beat())

    def survive(self) -> int:
        """`train`, with a commit where a peer is lost, of a run that no frame holds (told.py)."""
        return self.keeper.survive(self.train)

    def train(self) -> int:
        """The loop; returns the exit status."""
        config, runtime, prepared = self.config, self.runtime, self.prepared
        model, replica, optimizer = self.model, self.replica, self.optimizer
        if self.start == self.total_steps:
            runtime.say(f"the run was finished already: step {self.start} of {self.total_steps}")
            return self.save_adapter()  # the run may have ended between its last two files
        stop, keeper, status, trouble = self.stop, self.keeper, None, None
        log = self.open_log()
        if self.start == 0:
            self.show_samples("before training")
            if self.evaluates:
                log.write({"step": 0, "eval_loss": (before := self.evaluate())})
                runtime.say(f"held-out loss before training: {before:.4f}")
        replica.zero_grad()
        replica.reductions = self.start  # so that audits fall on the same steps as without a stop
        replica.wire.take()
        display = StepDisplay(self.total_steps, self.start, runtime.main, replica.final_budget)
        with keeper.writing(), display, stop.committing(keeper.alone), self.hang.watching():
            for step in range(self.start, self.total_steps):
                began = time.perf_counter()

                # 1  the step's sequences, the same whatever the world size, and this rank's part
                ids = prepared.sampler.step(step)
                lengths = prepared.train.lengths
                dealt = deal(ids, lengths, runtime.world, config.train.micro_batch_size)

                # 2  forward and backward, summed over this rank's target tokens
                loss_sum, tokens = torch.zeros((), device=runtime.device), 0
                for micro in dealt[runtime.rank]:
                    batch = collate(
                        [prepared.train[i] for i in micro], prepared.pad_id, runtime.device
                    )
                    with self.sample_keys(step, batch):
                        summed = self.objective.loss(model, batch)
                        summed.backward()
                    loss_sum += summed.detach()
                    tokens += batch.num_targets

                # 3  one reduction: gradients become the mean over all target tokens of all ranks
                sums = [float(loss_sum), float(self.hooks.should_save()), *stop.poll()]
                reduced = replica.reduce_gradients(tokens, sums=sums, each=self.meter.peak() >> 10)

                # 4  clip, schedule, step (after which AdaLoRA scores and masks by itself)
                loss = reduced.sums[0] / max(reduced.tokens, 1)
                norm = float(replica.clip(config.optimizer.max_grad_norm or math.inf))
                lr = self.set_lr(step)
                if is_finite(loss, norm):
                    optimizer.step()
                else:
                    replica.leave_out(optimizer)
                replica.zero_grad()

                # 5  look, log, save
                done = step + 1
                last = done == self.total_steps
                if last:
                    replica.audit()  # as the replica does by itself at every 10th reduction
                if due(done, TRIM_EVERY, last=last):
                    trim()
                seconds = time.perf_counter() - began
                record = {
                    "step": done,
                    "loss": loss,
                    "grad_norm": norm,
                    "lr": lr,
                    "tokens": reduced.tokens,
                    "step_seconds": seconds,
                    "tokens_per_second": reduced.tokens / seconds,
                    "peak_memory_bytes": max(reduced.each) << 10,
                    "wire_bytes": replica.wire.take(),
                    "batch_hash": batch_hash(ids),
                    **replica.figures(),
                }
                keeper.keep(done, record)
                trouble = self.losses.see(record, ids) or self.unused.see(
                    replica.named, replica.present
                )
                self.records.append(record)
                status = 1 if trouble else exit_status(reduced.sums[2:])
                evaluated = self.evaluates and due(done, config.output.eval_every, last=last)
                if evaluated:
                    record["eval_loss"] = self.evaluate()
                if evaluated or due(done, config.output.log_every):
                    log.write(record)
                    display.update(record)
                asked = status is not None or reduced.sums[1] > 0
                if asked or due(done, config.output.save_every, last=last):
                    keeper.save(done, record)

                # 6  a signal on any rank, or trouble, stops all of them here, after the commit
                if trouble or (status is not None and not last):
                    break
        if last and runtime.main:
            keeper.masks.write(until=done)
            keeper.masks.draw(log, runtime.say)
        log.close()
        if trouble:
            runtime.fail(f"stopped after step {done}: {trouble}")
            return 1
        if status is None or last:
            return self.finish()
        runtime.say(f"stopped by {stop.cause or 'another rank'} after step {done}; {RESUMES}")
        return status

    # -- what the loop asks for -----------------------------------------------------------------

    def beat(self) -> None:
        """A pass begins: a sign of progress."""
        self.stop.beat()
        self.hang.beat()

    @property
    def evaluates(self) -> bool:
        return self.prepared.eval is not None and self.config.output.eval_every > 0

    def set_lr(self, step: int) -> float:
        optimizer = self.config.optimizer
        factor = lr_factor(optimizer.schedule, step, self.total_steps, optimizer.warmup_ratio)
        return set_lr(self.optimizer, factor)

    def sample_keys(self, step: int, batch: Batch) -> Any:
        """Random numbers of one micro-batch: keyed by what it holds, not by who computes it.

        The base's own dropout layers, where it has any, draw from torch's generator.
        """
        seed = self.config.train.seed
        torch.manual_seed(seed_of(seed, step, *batch.ids[:1]))
        keys = SampleKeys(seed, step, batch.ids, batch.lengths)
        return attachment_of(self.model).stream.keyed(keys)

    def evaluate(self) -> float:
        assert self.prepared.eval is not None
        loss = held_out_loss(
            self.model,
            self.prepared.eval,
            pad_id=self.prepared.pad_id,
            micro_batch_size=self.config.train.micro_batch_size,
            rank=self.runtime.rank,
            world=self.runtime.world,
        )
        self.replica.release()
        self.replica.wire.take()  # wire_bytes are those of training
        return loss

    def show_samples(self, when: str) -> None:
        count, dataset = self.config.output.samples, self.prepared.eval or self.prepared.train
        if count == 0:
            return
        tokenizer, pad_id = self.prepared.tokenizer, self.prepared.pad_id
        answers = sample_answers(self.model, tokenizer, dataset, count=count, pad_id=pad_id)
        self.replica.release()
        for prompt, reference, answer in answers:
            self.runtime.say(
                f"--- sample, {when}\n{prompt}\n  wanted: {reference}\n  answer: {answer}"
            )

    def open_log(self) -> Any:
        if not self.runtime.main:
            return SilentLog()
        log = open_directory(self.config, self.prepared, self.start, self.runtime.warn)
        self.keeper.masks.take_up(self.start)
        return log

    def finish(self) -> int:
        """The closing lines and the adapter; the exit status."""
        self.show_samples("after training")
        if self.runtime.main and (line := held_out_line(self.directory)):
            self.runtime.say(line)
        self.losses.close()
        status = self.save_adapter()
        measured = measure(self.model, self.replica, self.optimizer, self.records)
        self.runtime.say(comparison(self.prepared.budget, measured, self.runtime.device.type))
        return status

    def save_adapter(self) -> int:
        """The adapter that stock PEFT loads; the exit status, of which rank 0's counts."""
        where = self.directory / "adapter"
        try:
            if self.runtime.main:
                save_adapter(self.model, where, base_model_name_or_path=self.config.model.path)
                self.keeper.publish(where)
        except OSError as error:
            self.runtime.fail(f"{where} could not be written: {error}; free the disk and {RESUMES}")
            return 1
        self.runtime.say(f"adapter: {where}")
        return 0


def due(step: int, every: int, last: bool = False) -> bool:
    """Whether something that happens every so many steps and last (0: never) happens at `step`."""
    return every > 0 and (step % every == 0 or last)


if __name__ == "__main__":
    exit_with(main)
