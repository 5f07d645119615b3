"""What a run trains: the placed base with its adapters, their replica, and the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from dlora.adapters.save_load import load_adapter
from dlora.api import TrainedReplica, attach_unstarted, replicate, start_adapters
from dlora.config.load import Config
from dlora.data import deal
from dlora.data.collate import Batch, collate
from dlora.lora.attach import attachment_of
from dlora.lora.init import INITS
from dlora.methods.lora_ga import PASSES, GradientEstimate
from dlora.methods.packed_residual import Residuals
from dlora.objectives import chunked_loss as targets
from dlora.objectives.objective import Objective
from dlora.optim.rule import Rule
from dlora.registry import room
from dlora.runtime.memory import trim_before
from dlora.runtime.ranks import Runtime
from dlora.sharding.engines.protocol import build_engine
from dlora.training.prepare import Preparation


def build(
    config: Config, runtime: Runtime, preparation: Preparation
) -> tuple[nn.Module, TrainedReplica]:
    """The sharded base with its adapters attached, and their replica."""
    engine = build_engine(preparation.placement, preparation.topology)
    residuals = residuals_of(config, runtime, preparation)
    model = preparation.base.load(engine, runtime.device, residuals and residuals.left)
    by_pairs = room("optim")[config.optimizer.name].says["divides"] == "pairs"
    replica = replicate(model, engine, divided=preparation.divided and not by_pairs)
    if config.sharding.audit == "heal":
        replica.healed = lambda found: runtime.say(
            f"warning: the adapters differed: {found}; healed"
        )
    attach_unstarted(model, preparation.lora, residual=residuals is not None)
    if residuals is not None:
        residuals.start(model)
    engine.hold(model, preparation.budget.resident)
    if config.adapter.path is not None and preparation.start is None:
        load_adapter(model, config.adapter.path)
    if config.sharding.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    targets.install(model)
    if runtime.device.type == "cpu":
        trim_before(targets.model_parts(model).head)
    if preparation.start is None and residuals is None:
        start(config, runtime, preparation, model, replica)
    model.train()
    return model, replica


def residuals_of(config: Config, runtime: Runtime, preparation: Preparation) -> Residuals | None:
    """What adapters start from, where the base is packed without it; of a run that goes on, from
    its checkpoint.
    """
    lora, resumed = preparation.lora, preparation.start
    if INITS[lora.init_lora_weights].needs != "weight" or config.model.quantization == "none":
        return None
    residuals = Residuals(preparation.base, lora)
    if resumed is not None:
        residuals.read(Path(resumed.directory), preparation.topology)
    else:
        runtime.say(str(residuals.factorise(preparation.topology)))
    return residuals


def start(
    config: Config,
    runtime: Runtime,
    preparation: Preparation,
    model: nn.Module,
    replica: TrainedReplica,
) -> None:
    """Start A and B where W0 or its gradient decides how; of a checkpoint they come from there."""
    needs = attachment_of(model).init.needs
    if needs == "weight":
        runtime.say(str(start_adapters(model)))
    if needs == "gradient":
        estimate = GradientEstimate(model, replica.topology, replica.wire)
        steps = min(config.adapter.lora_ga_batches, preparation.sampler.total_steps)
        sequences = preparation.sampler.sequences(steps)
        runtime.say(
            f"init_lora_weights: lora_ga: estimating gradients on {sequences} sequences, in "
            f"{PASSES} passes"
        )
        batches = list(_first_batches(config, runtime, preparation))
        estimate.run(batches, objective_of(config).loss)
        replica.release()
        runtime.say(str(estimate.start()))


def _first_batches(config: Config, runtime: Runtime, preparation: Preparation) -> Iterator[Batch]:
    """This rank's micro-batches of the run's first `adapter.lora_ga_batches` steps.

    One sequence at a time where activations are recomputed: in eval mode models do not.
    """
    train, sampler = preparation.train, preparation.sampler
    rows = 1 if config.sharding.activation_checkpointing else config.train.micro_batch_size
    for step in range(min(config.adapter.lora_ga_batches, sampler.total_steps)):
        for micro in deal(sampler.step(step), train.lengths, runtime.world, rows)[runtime.rank]:
            yield collate([train[i] for i in micro], preparation.pad_id, runtime.device)


def objective_of(config: Config) -> Objective:
    """What `train.objective` minimises."""
    name = config.train.objective
    return room("objectives")[name].load()(getattr(config, name, None))


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
    rule: type[Rule] = room("optim")[section.name].load()
    pairs = replica.pairs if rule.divides == "pairs" else []  # a method may have others beside them
    optimizer = rule.build(groups, pairs, section, runtime.device, runtime.say)
    if rule.divides == "pairs" and not preparation.divided:
        return optimizer
    return replica.drive(optimizer)
