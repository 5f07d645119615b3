"""Builds what a run of several adapters trains: one placed base, and of each adapter its own."""

from __future__ import annotations

import torch

from dlora.adapters.hub import adapter_directory
from dlora.adapters.save_load import load_adapter
from dlora.base.eval_mode import keep_in_eval
from dlora.base.recomputation import recompute_blocks
from dlora.config.load import Config
from dlora.hooks import Hooks
from dlora.lora.attach import attachment_of
from dlora.lora.names import by_name
from dlora.methods.attach import attach_unstarted, start_adapters
from dlora.methods.trained_replica import TrainedReplica, replicate
from dlora.runtime.console import console
from dlora.runtime.memory import unmap_large_blocks
from dlora.runtime.ranks import Ranks
from dlora.runtime.run_lock import RunLock
from dlora.sharding.engines.protocol import build_engine
from dlora.together.context import JointContext
from dlora.together.member import Member, Standing
from dlora.together.prepare import JointPreparation
from dlora.together.replicas import Optimizers, Replicas
from dlora.training.build import build_optimizer
from dlora.training.context import RunContext
from dlora.training.prepare import Preparation
from dlora.training.record import log_healed
from dlora.training.residents import Residents
from dlora.training.selection import Selection
from dlora.training.watchdogs import FiniteWatch, UnusedWatch


def build_together(
    config: Config, ranks: Ranks, prepared: JointPreparation, lock: RunLock, hooks: Hooks
) -> JointContext:
    """The parts of a run: the sharded base, and each adapter with its replica and optimizer.

    Every adapter draws its A and B as a run of it alone does, from its own seed.
    """
    if ranks.device.type == "cpu":
        unmap_large_blocks()
    first = prepared.first
    torch.manual_seed(config.train.seed)
    engine = build_engine(prepared.placement, prepared.topology)
    model = first.base.load(engine, ranks.device, None)
    rounded = torch.bfloat16 if config.sharding.reduce_dtype == "bfloat16" else None
    shared = replicate(model, engine, reduce_dtype=rounded)
    for name, own in prepared.members.items():
        torch.manual_seed(own.config.train.seed)
        trained = prepared.standing[name] is Standing.RUNNING
        attach_unstarted(model, own.lora, name=name, trained=trained)
    residents = Residents(prepared.decision, engine, model, ranks.device)
    for name, own in prepared.members.items():
        if own.config.adapter.path is not None and own.resumed is None:
            with by_name(model, name):
                load_adapter(model, adapter_directory(own.config.adapter.path))
    how = prepared.budget.workload.checkpointing
    recompute_blocks(model, how.every, how.offload)
    keep_in_eval(model)
    first.task.install(model)
    model.train()
    members: list[Member] = []
    for name, own in prepared.members.items():
        with by_name(model, name):
            attachment_of(model).stream.announce = console.info
            if own.resumed is None and attachment_of(model).init.needs == "weight":
                console.info(f"{name}: {start_adapters(model)}")
        replica = shared.others.get(name, shared)
        if config.sharding.audit == "heal":
            log_healed(own.config, ranks, replica, name)
        context = _context(name, ranks, own, model, replica, residents, lock, hooks, config)
        members.append(_member(name, context, prepared.standing[name]))
        members[-1].why = prepared.why(name)
    replicas, optimizers = Replicas(model, shared, members), Optimizers(members)
    return JointContext(
        config, ranks, prepared, model, replicas, residents, optimizers, lock, hooks, members
    )


def _context(
    name: str,
    ranks: Ranks,
    own: Preparation,
    model: torch.nn.Module,
    replica: TrainedReplica,
    residents: Residents,
    lock: RunLock,
    hooks: Hooks,
    config: Config,
) -> RunContext:
    """The context of a run of one adapter; one that has left has no optimizer's state."""
    optimizer = (
        build_optimizer(own.config, ranks, own, replica)
        if replica.named
        else torch.optim.SGD([torch.zeros(())], lr=0.0)
    )
    parts = (own.config, ranks, own, model, replica, residents, optimizer, lock, hooks)
    selection = Selection.of(own.config)
    return RunContext(*parts, name=name, saved_in=config.output.directory, selection=selection)


def _member(name: str, context: RunContext, standing: Standing) -> Member:
    file = context.directory / "nonfinite.json" if context.ranks.main else None
    unused = UnusedWatch(context.config.train.allow_unused, context.prepared.unreached)
    member = Member(name, context, FiniteWatch(file), unused, standing)
    member.losses.say = member.say
    return member
