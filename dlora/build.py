"""What a run trains: the placed base with its adapters, their replica, and the optimizer."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from dlora.adapter_files import load_adapter
from dlora.api import TrainedReplica, attach, replicate
from dlora.config import EIGHT_BIT, Config
from dlora.memory import trim_before
from dlora.objectives import targets
from dlora.optim.eight_bit import adamw8bit
from dlora.optim.lora_pro import LoraPro
from dlora.prepare import Preparation
from dlora.runtime import Runtime
from dlora.sharding.engine import build_engine


def build(
    config: Config, runtime: Runtime, preparation: Preparation
) -> tuple[nn.Module, TrainedReplica]:
    """The sharded base with its adapters attached, and their replica."""
    engine = build_engine(preparation.placement, preparation.topology)
    model = preparation.base.load(engine, runtime.device)
    by_element = preparation.divided and config.optimizer.name != "lora_pro"
    replica = replicate(model, engine, divided=by_element)
    if config.sharding.audit == "heal":
        replica.healed = lambda found: runtime.say(
            f"warning: the adapters differed: {found}; healed"
        )
    attach(model, preparation.lora)
    engine.hold(model, preparation.budget.resident)
    if config.adapter.path is not None and preparation.start is None:
        load_adapter(model, config.adapter.path)
    if config.sharding.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    targets.install(model)
    if runtime.device.type == "cpu":
        trim_before(targets.model_parts(model).head)
    model.train()
    return model, replica


def build_optimizer(
    config: Config, runtime: Runtime, preparation: Preparation, replica: TrainedReplica
) -> Optimizer:
    """The optimizer over the replica's plain tensors, driven by it."""
    section = config.optimizer
    groups = replica.parameter_groups(
        lr=section.lr,
        loraplus_lr_ratio=section.loraplus_lr_ratio,
        weight_decay=section.weight_decay,
    )
    if section.name == "lora_pro":
        optimizer = LoraPro(groups, replica.pairs, moments=section.lora_pro_moments)
        return replica.drive(optimizer) if preparation.divided else optimizer
    if section.name in EIGHT_BIT:
        paged = section.name == "paged_adamw8bit"
        if paged and runtime.device.type == "cpu":
            runtime.say("warning: optimizer.name: without a GPU paged_adamw8bit is adamw8bit")
            paged = False
        return replica.drive(adamw8bit(groups, paged=paged))
    if section.name == "sgd":
        return replica.drive(torch.optim.SGD(groups))
    return replica.drive(torch.optim.AdamW(groups, fused=True))
