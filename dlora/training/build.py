"""Builds what a run trains: the placed base with adapters, their replica, and the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dlora.adapters.hub import adapter_directory
from dlora.adapters.mixture import fill_experts, frozen_experts
from dlora.adapters.save_load import load_adapter
from dlora.base.eval_mode import keep_in_eval
from dlora.base.model_class import draw_copies
from dlora.base.recomputation import recompute_blocks
from dlora.config.load import Config
from dlora.data import Dealing
from dlora.data.batches import Batches
from dlora.data.collate import Batch
from dlora.hooks import Hooks
from dlora.lora.attach import attachment_of
from dlora.lora.init import INITS
from dlora.methods.attach import attach_unstarted, start_adapters
from dlora.methods.lora_ga import PASSES, GradientEstimate
from dlora.methods.packed_residual import Residuals
from dlora.methods.trained_replica import TrainedReplica, replicate
from dlora.objectives.objective import objective_of
from dlora.optim.rule import Rule
from dlora.registry import room
from dlora.runtime.console import console
from dlora.runtime.memory import unmap_large_blocks
from dlora.runtime.ranks import Ranks
from dlora.runtime.run_lock import RunLock
from dlora.sharding.engines.protocol import build_engine
from dlora.sharding.replica.frozen import same_on_every_rank
from dlora.training.compiled import CompiledBlocks
from dlora.training.context import RunContext
from dlora.training.prepare import Preparation
from dlora.training.record import log_healed
from dlora.training.reference import freeze_reference
from dlora.training.residents import Residents
from dlora.training.selection import Selection
from dlora.training.teacher import build_teacher
from dlora.training.warm_up import start_compiled


def build(
    config: Config, ranks: Ranks, prepared: Preparation, lock: RunLock, hooks: Hooks
) -> RunContext:
    """The parts of a run: the sharded base with its adapters, their replica and its optimizer."""
    if ranks.device.type == "cpu":
        unmap_large_blocks()
    torch.manual_seed(config.train.seed)
    engine = build_engine(prepared.placement, prepared.topology)
    residuals = residuals_of(config, prepared, ranks.device)
    model = prepared.base.load(engine, ranks.device, residuals and residuals.left)
    torch.manual_seed(config.train.seed)  # some classes draw while they are made, engine by engine
    by_pairs = room("optim")[config.optimizer.name].says["divides"] == "pairs"
    replica = replicate(
        model,
        engine,
        divided=prepared.divided and not by_pairs,
        reduce_dtype=torch.bfloat16 if config.sharding.reduce_dtype == "bfloat16" else None,
    )
    if config.sharding.audit == "heal":
        log_healed(config, ranks, replica, "the adapters")
    attach_unstarted(model, prepared.lora, residual=residuals is not None)
    if residuals is not None:
        residuals.start(model)
    if prepared.drawn and prepared.resumed is None:
        draw_copies(model, prepared.base.skeleton(), prepared.drawn, config.train.seed)
    residents = Residents(prepared.decision, engine, model, ranks.device)
    if config.adapter.path is not None and prepared.resumed is None:
        load_adapter(model, adapter_directory(config.adapter.path))
    if prepared.resumed is None and (experts := frozen_experts(model)):
        fill_experts(model, experts)
        same_on_every_rank(replica.frozen, prepared.topology)
    # Around which checkpointing comes.
    blocks = CompiledBlocks(model, packs=prepared.dealing.packs) if prepared.compiles else None
    how = prepared.budget.workload.checkpointing
    recompute_blocks(model, how.every, how.offload)
    keep_in_eval(model)
    prepared.task.install(model)
    if prepared.resumed is None and residuals is None:
        initialise(config, ranks, prepared, model, replica)
    freeze_reference(config, prepared.resumed, model, replica)
    model.train()
    optimizer = build_optimizer(config, ranks, prepared, replica)
    objective: Any = objective_of(config)
    if prepared.teacher is not None:
        objective.teacher = build_teacher(prepared, model, replica, ranks.device)
    parts = (config, ranks, prepared, model, replica, residents, optimizer, lock, hooks, blocks)
    context = RunContext(*parts, objective, selection=Selection.of(config))
    start_compiled(context, objective)
    return context


def residuals_of(config: Config, prepared: Preparation, device: torch.device) -> Residuals | None:
    """A0 and B0 of adapters that start from a packed W0; a resumed run reads its checkpoint's."""
    lora, resumed = prepared.lora, prepared.resumed
    if INITS[lora.init_lora_weights].needs != "weight" or config.model.quantization == "none":
        return None
    residuals = Residuals(prepared.base, lora, device)
    if resumed is not None:
        residuals.read(Path(resumed.directory), prepared.topology)
    else:
        console.info(str(residuals.factorise(prepared.topology)))
    return residuals


def initialise(
    config: Config,
    ranks: Ranks,
    prepared: Preparation,
    model: nn.Module,
    replica: TrainedReplica,
) -> None:
    """Initialise A and B where W0 or its gradient decides how."""
    needs = attachment_of(model).init.needs
    if needs == "weight":
        console.info(str(start_adapters(model)))
    if needs == "gradient":
        estimate = GradientEstimate(model, replica.topology, replica.wire)
        steps = min(config.adapter.lora_ga_batches, prepared.sampler.total_steps)
        sequences = prepared.sampler.sequences(steps)
        console.info(
            f"init_lora_weights: lora_ga: estimating gradients on {sequences} sequences, in "
            f"{PASSES} passes"
        )
        batches = list(_first_batches(config, ranks, prepared))
        estimate.run(batches, objective_of(config).loss)
        replica.release()
        console.info(str(estimate.start()))


def _first_batches(config: Config, ranks: Ranks, prepared: Preparation) -> Iterator[Batch]:
    """This rank's micro-batches of the run's first `adapter.lora_ga_batches` steps.

    One sequence at a time with activation checkpointing, which models ignore in eval mode.
    """
    train, sampler = prepared.train, prepared.sampler
    deal = Dealing(1) if prepared.budget.workload.checkpointing else prepared.dealing
    for step in range(min(config.adapter.lora_ga_batches, sampler.total_steps)):
        for micro in deal(sampler.step(step), train.lengths, ranks.world)[ranks.rank]:
            yield prepared.collate([train[i] for i in micro]).to(ranks.device)


def batches_of(prepared: Preparation, ranks: Ranks, *, pinned: bool = False) -> Batches:
    """This rank's micro-batches of a run."""
    return Batches(
        prepared.train,
        prepared.sampler,
        rank=ranks.rank,
        world=ranks.world,
        deal=prepared.dealing,
        collate=prepared.collate,
        pinned=pinned,
    )


def build_optimizer(
    config: Config, ranks: Ranks, prepared: Preparation, replica: TrainedReplica
) -> Optimizer:
    """The optimizer over the replica's plain tensors, driven by it."""
    section = config.optimizer
    groups = replica.parameter_groups(
        lr=section.lr,
        loraplus_lr_ratio=section.loraplus_lr_ratio,
        weight_decay=section.weight_decay,
    )
    rule: type[Rule] = room("optim")[section.name].load()
    pairs = replica.pairs if rule.divides == "pairs" else []  # a method may have other factors
    optimizer = rule.build(groups, pairs, section, ranks.device, console.info)
    if rule.divides == "pairs" and not prepared.divided:
        return optimizer
    return replica.attach_optimizer(optimizer)
