"""One run of several adapters: the loop of `dlora.train`, with one pass and one reduction for all.

The loop reads top to bottom:  1 each adapter's sequences of the step   2 joined passes
3 one reduction   4 each adapter's clip, schedule, optimizer   5 watch, log, save   6 who leaves?
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import zip_longest
from typing import Any

from dlora.config.load import Config
from dlora.data.collate import Batch
from dlora.hooks import NO_HOOKS, Hooks
from dlora.lora.names import attached, by_name
from dlora.lora.shared_batch import only
from dlora.methods.trained_replica import TrainedReplica, replica_of
from dlora.metrics.progress import StepDisplay
from dlora.objectives.objective import objective_of
from dlora.optim.schedule import lr_factor, set_lr
from dlora.plan.measured import measure, stored
from dlora.runtime.console import console
from dlora.runtime.memory import MemoryMeter, trim_after_step
from dlora.runtime.peer_watch import PeerWatch
from dlora.runtime.ranks import Ranks
from dlora.runtime.run_lock import RunLock
from dlora.runtime.stop_signals import STOP_FLAGS, StopRequest, exit_status
from dlora.sharding.replica.joint import Addend, JointReduction
from dlora.sharding.replica.step_scalars import Reduced
from dlora.together.build import build_together
from dlora.together.figures import Figures, Sums, joint_record
from dlora.together.join import JoinedBatch, join
from dlora.together.leave import close, finish, keep_each, leave
from dlora.together.member import Member, Standing
from dlora.together.opening import open_logs
from dlora.together.prepare import JointPreparation
from dlora.training.best import see
from dlora.training.build import batches_of
from dlora.training.checkpointing import CheckpointManager
from dlora.training.record import stopped
from dlora.training.reporting import due
from dlora.training.resume import resume
from dlora.training.watchdogs import HangWatch, beat_in_passes, is_finite


class TogetherRun:
    """One run: what the loop works on, set up once, and the loop."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        prepared: JointPreparation,
        meter: MemoryMeter,
        lock: RunLock,
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        config = prepared.config
        self.config, self.ranks, self.prepared = config, ranks, prepared
        self.meter, self.lock = meter, lock
        self.peers = PeerWatch(ranks)
        self.hooks = hooks.within(self.peers.waiting)
        stop_path = config.output.stop_path if ranks.main else None
        self.stop = StopRequest(stop_path, self.hooks.should_stop)
        self.hang = HangWatch(config.sharding.timeout_seconds)
        self.objective: Any = objective_of(prepared.first.config)
        with self.peers.watching(config.sharding.loading_timeout_seconds):
            self.joint = build_together(config, ranks, prepared, lock, self.hooks)
            self.start = resume(self.joint)
        self.model, self.members = self.joint.model, self.joint.members
        self.total_steps = prepared.total_steps
        self.seeds = {member.name: member.config.train.seed for member in self.members}
        self.figures = Figures(config, ranks, prepared)
        self.records: list[dict[str, Any]] = []  # of the steps since this start
        self.status = 0
        self.checkpoints = CheckpointManager(self.joint, self.start)
        beat_in_passes(self.model, (self.stop, self.hang, self.peers))

    @property
    def running(self) -> list[Member]:
        """The adapters that are trained."""
        return [member for member in self.members if member.running]

    def run(self) -> int:
        """`train`, with a commit where a peer is lost; returns the exit status."""
        checkpoints, limits = self.checkpoints, self.config.sharding
        with self.peers.watching(limits.loading_timeout_seconds):
            self.ranks.loaded()
        with self.peers.watching(limits.timeout_seconds, checkpoints.commit_alone):
            return checkpoints.guard(self.train, self.peers)

    def train(self) -> int:
        """The loop; returns the exit status."""
        config, stop, checkpoints = self.config, self.stop, self.checkpoints
        residents, status = self.joint.residents, None
        self.begin()
        display = StepDisplay(self.total_steps, self.start, self.ranks.main)
        committing = stop.committing(checkpoints.commit_alone)
        with checkpoints.writing(), display, committing, self.hang.watching(), ExitStack() as data:
            batches = {
                m.name: data.enter_context(batches_of(m.prepared, self.ranks)) for m in self.running
            }
            for step in range(self.start, self.total_steps):
                running = self.running
                if not running:
                    break
                began, done = time.perf_counter(), step + 1
                last = all(done >= member.total_steps for member in running)

                # 1  each adapter's sequences of the step, and this rank's part of them
                dealt = {m.name: batches[m.name].step(step) for m in running}
                ids = {name: of_step for name, (of_step, _) in dealt.items()}

                # 2  passes over joined micro-batches; each adapter's losses are summed apart
                sums = self.passes(step, {name: mine for name, (_, mine) in dealt.items()})

                # 3  one reduction: of each adapter, the mean over all of its target tokens
                checkpoints.before_change()
                flags: dict[str, Any] = {"save": float(self.hooks.should_save())}
                flags["near"] = residents.near(self.meter)
                flags |= zip(STOP_FLAGS, stop.poll(), strict=True)
                reduced = self.reduce(running, sums, flags)
                common = reduced[running[0].name]

                # 4  clip, schedule, step of each adapter (after which its method's state follows)
                lrs = {m.name: self.step(m, step, reduced[m.name]) for m in running}
                residents.give_way(common.scalars["near"])

                # 5  watch, log, save
                self.lock.check()
                trim_after_step(self.ranks.device)
                seconds, wire = time.perf_counter() - began, self.shared.wire.take()
                lines = {
                    m.name: self.figures.of(m, done, ids[m.name], reduced[m.name], lrs[m.name])
                    for m in running
                }
                self.figures.complete(running, lines, common, seconds, wire)
                checkpoints.snapshot(done, lines)
                record = joint_record(done, lines)
                self.records.append(record)
                failing = {m.name: self.trouble(m, lines[m.name], ids[m.name]) for m in running}
                stops = [common.scalars[flag] for flag in STOP_FLAGS]
                status = exit_status(stops)
                improved = [m for m in running if self.log(m, done, lines[m.name])]
                if due(done, config.output.log_every) or last:
                    display.update(record, self.figures.progress(lines))

                # 6  who has failed leaves before the commit, who has finished after it
                if done == self.start + 1:
                    self.stored = stored(self.model, self.joint.replica, self.joint.optimizer)
                for member in running:
                    if (why := failing[member.name]) is not None:
                        self.fail(member, done, why)
                    elif reduced[member.name].scalars["drop"] > 0 and done < member.total_steps:
                        member.say(f"is dropped after step {done}")
                        leave(self.joint, member, Standing.DROPPED, done, "dropped")
                ended = [m for m in running if not m.running or done >= m.total_steps]
                asked = status is not None or common.scalars["save"] > 0
                if asked or ended or improved or due(done, config.output.save_every, last=last):
                    checkpoints.save(done, record)
                keep_each(self.joint, improved, checkpoints)
                for member in ended:
                    self.end(member, done)
                if status is not None and not last:
                    break
        return self.close(status)

    # -- what the loop asks for -----------------------------------------------------------------

    @property
    def shared(self) -> TrainedReplica:
        """The replica of the model, which has the engine and counts what is sent."""
        replica = replica_of(self.model)
        assert replica is not None
        return replica

    def begin(self) -> None:
        """Open the logs; an adapter that has no steps left leaves at once."""
        for member in open_logs(self.joint, self.start):
            self.end(member, self.start)
        self.status |= any(m.standing is Standing.FAILED for m in self.members)
        self.shared.wire.take()
        self.join_reductions()

    def join_reductions(self) -> None:
        """Let one reduction be for those that are trained."""
        replicas = [member.context.replica for member in self.running]
        self.reduction = JointReduction(replicas, self.shared.reduction)

    def passes(self, step: int, mine: dict[str, Iterator[Batch]]) -> dict[str, Sums]:
        """Forward and backward of this rank's micro-batches: each adapter's sums."""
        sums = {name: Sums() for name in mine}
        with ExitStack() as stack:
            for attachment in attached(self.model).values():
                stack.enter_context(attachment.values.shared())
            for joined in self.joined(mine):
                with joined.computing(self.model, self.seeds, step):
                    parts = joined.parts(self.model)
                    losses = self.objective.loss_of_parts(self.model, joined.batch, parts)
                    losses.sum().backward()
                self.checkpoints.look()
                for share, loss in zip(joined.shares, losses.detach(), strict=True):
                    sums[share.name].add(share.batch, loss)
        return sums

    def joined(self, mine: dict[str, Iterator[Batch]]) -> Iterator[JoinedBatch]:
        """The k-th micro-batches of all adapters, for each k."""
        first = self.prepared.first
        for group in zip_longest(*mine.values()):
            there = [(n, b) for n, b in zip(mine, group, strict=True) if b is not None]
            joined = join(there, first.pad_id, packs=first.dealing.packs)
            yield joined.to(self.ranks.device)

    def reduce(
        self, running: list[Member], sums: dict[str, Sums], flags: dict[str, Any]
    ) -> dict[str, Reduced]:
        """One reduction of all gradients; flags and memory travel with the first adapter's."""
        addends = []
        for place, member in enumerate(running):
            own = sums[member.name]
            more, peak = ({}, 0) if place else (flags, self.meter.peak())
            drop = {"drop": float(self.hooks.should_drop(member.name))}
            addends.append(Addend(own.tokens, {**own.scalars, **drop, **more}, peak))
        found = self.reduction.reduce_gradients(addends)
        return {member.name: one for member, one in zip(running, found, strict=True)}

    def step(self, member: Member, step: int, reduced: Reduced) -> float:
        """Clip and step of one adapter; returns its learning rate."""
        replica, optimizer = member.context.replica, member.context.optimizer
        section, total = member.config.optimizer, member.total_steps
        loss = reduced.scalars["loss"] / max(reduced.tokens, 1)
        replica.clip(section.max_grad_norm or math.inf, reduced.norm)
        lr = set_lr(optimizer, lr_factor(section.schedule, step, total, section.warmup_ratio))
        if is_finite(loss, reduced.norm):
            optimizer.step()
        else:
            replica.skip_step(optimizer)
        replica.zero_grad()
        if step + 1 == total:
            replica.audit()
        return lr

    def trouble(self, member: Member, line: dict[str, Any], ids: Any) -> str | None:
        """Why an adapter has to leave after this step, or None."""
        found = member.losses.see(line, ids)
        replica = member.context.replica
        return found or member.unused.see(replica.named, replica.present)

    def log(self, member: Member, done: int, line: dict[str, Any]) -> bool:
        """Log an adapter's line, with its evaluation where that is due; whether it is the best."""
        output, last = member.config.output, done >= member.total_steps
        evaluated = due(done, member.context.eval_every, last=last)
        if evaluated:
            with by_name(self.model, member.name), only(self.model, member.name):
                line |= see(member.context, done)
        if evaluated or due(done, output.log_every):
            member.log.write(line)
        return evaluated and member.context.selection.improved

    def fail(self, member: Member, done: int, why: str) -> None:
        """An adapter that cannot go on leaves; the others do go on."""
        console.error(f"{member.name} leaves after step {done}: {why}")
        leave(self.joint, member, Standing.FAILED, done, why)
        self.status = 1

    def end(self, member: Member, done: int) -> None:
        """After the commit: write the adapter of one that has finished, and go on without it."""
        why = member.why
        if member.standing in (Standing.RUNNING, Standing.FINISHED):
            status = finish(self.joint, member, self.checkpoints, done)
            self.status, why = max(self.status, status), "its adapter was not written" * status
        elif member.log is not None:
            member.log.close()
        self.hooks.left(member.name, member.standing.value, why)
        self.join_reductions()

    def close(self, status: int | None) -> int:
        """The last lines; returns the exit status."""
        for member in self.running:
            member.log.close()
        if status is not None and self.running:
            return stopped(self.joint, self.records[-1]["step"], self.stop.cause, status)
        measured = None
        if self.records:
            most = len(self.records[0]["adapters"])  # the plan is for as many as there were
            steps = [record for record in self.records if len(record["adapters"]) == most]
            measured = measure(self.joint.replica, steps, self.stored)
        return close(self.joint, measured, self.status)
