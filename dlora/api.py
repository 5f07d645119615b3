"""The calls of a training loop of one's own: `attach`, `shard` and those around them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlora.adapters.mixture import fill_experts, frozen_experts, with_experts
from dlora.adapters.model_methods import equip, unequip
from dlora.adapters.peft_settings import config_for
from dlora.adapters.save_load import load_adapter as read_adapter
from dlora.adapters.swap import load_named
from dlora.base.eval_mode import random_settings
from dlora.errors import UsageError
from dlora.lora.attach import every_parameter
from dlora.lora.config import LoraConfig
from dlora.lora.names import activate, attached
from dlora.lora.several import DEFAULT
from dlora.lora.variants.mola import MolaConfig
from dlora.methods.attach import attach as attach_adapters
from dlora.methods.attach import warn_of_left
from dlora.methods.lora_ga import GradientEstimate, LossOf
from dlora.methods.matrix_init import Started
from dlora.methods.named import remove as remove_adapters
from dlora.methods.named import rename
from dlora.methods.trained_replica import TrainedReplica, replica_of, replicate
from dlora.plan.own_loop import cheapest_base
from dlora.sharding.engines.gather_groups import frozen_groups, worth_holding
from dlora.sharding.engines.own_engine import check_engine
from dlora.sharding.engines.protocol import build_engine, engine_class, sharded_by
from dlora.sharding.replica.frozen import same_on_every_rank
from dlora.sharding.replica.optimizer_state import state_is_divided
from dlora.sharding.topology import Topology, resolve_placement

__all__ = [
    "TrainedReplica",
    "activate",
    "attach",
    "attached",
    "load_adapter",
    "remove",
    "rename",
    "replica_of",
    "shard",
    "start_from_gradients",
]


def attach(
    model: nn.Module, config: LoraConfig | Any, name: str = DEFAULT, *, is_trainable: bool = True
) -> nn.Module:
    """Put adapters on `model` in place, before or after `shard`, and return the model.

    The model gains the methods of `dlora.adapters.model_methods.AdaptedModel`: `save_pretrained`
    writes the adapter, `print_trainable_parameters` counts. See `dlora.methods.attach.attach`.

    Args:
        config: dlora's, or a `LoraConfig` or `AdaLoraConfig` of PEFT with PEFT's meaning.
        name: of these adapters; each call needs another one. The first ones are active at once,
            others from `activate` on, as in PEFT. After `shard`, those that are trained have a
            replica of their own, `replica_of(model, name)`.
        is_trainable: False: they get no gradients; for those with a name.

    Raises:
        UsageError: see `dlora.methods.attach.attach`; the name is taken, or cannot be one.
    """
    if name == DEFAULT and not is_trainable:
        raise UsageError("attach: is_trainable=False is for adapters with a name: name=…")
    config = with_experts(config_for(model, config))
    attach_adapters(model, config, name=name, trained=is_trainable)
    if isinstance(config, MolaConfig) and config.frozen:
        _read_experts(model)
    equip(model)
    return model


def _read_experts(model: nn.Module) -> None:
    """Fill the frozen experts of a mixture, equal on every rank of a model that is sharded."""
    if next(model.parameters()).device.type == "meta":
        return
    fill_experts(model, frozen_experts(model))
    if (replica := replica_of(model)) is not None:
        same_on_every_rank(replica.frozen, replica.topology)


def load_adapter(
    model: nn.Module, directory: str | Path, name: str = DEFAULT, *, is_trainable: bool = False
) -> nn.Module:
    """Load an adapter that dlora or PEFT wrote; attaches it first where nothing is attached.

    With a name it may take the place of another one on a running, sharded model, see
    `dlora.adapters.swap.load_named`. Without one, see `dlora.adapters.save_load.load_adapter`. The
    model gains methods as by `attach`.

    Args:
        is_trainable: True: an adapter with a name that is attached by this call is trained; the one
            without a name always is.
    """
    if name == DEFAULT:
        read_adapter(model, directory)
    else:
        load_named(model, directory, name, is_trainable)
    equip(model)
    return model


def remove(model: nn.Module, name: str) -> None:
    """Take the adapters of a name off a model; see `dlora.methods.named.remove`.

    With the last one the model loses the methods that it gained by `attach`.
    """
    remove_adapters(model, name)
    unequip(model)


def start_from_gradients(model: nn.Module, batches: Iterable[Any], loss_of: LossOf) -> Started:
    """Start adapters with `init_lora_weights="lora_ga"` from the gradient over some batches.

    Collective, once the model is sharded, if it is to be. No gradient is left on any parameter.

    Args:
        batches: of this rank; some hundred sequences in all are enough. Four passes are made.
        loss_of: `loss_of(model, batch)`, the loss summed over the batch's target tokens. Means are
            summed unweighted.

    Returns:
        How many layers started; `str()` of it is a line for the user.

    Raises:
        UsageError: the adapters do not start from gradients, there are none, or a rank has no
            batches.
    """
    replica = replica_of(model)
    topology = replica.topology if replica else Topology.current()
    estimate = GradientEstimate(model, topology, replica.wire if replica else None)
    estimate.run(list(batches), loss_of)
    if replica is not None:
        replica.release()
    started = estimate.start()
    warn_of_left(started)
    return started


def shard(
    model: nn.Module,
    engine: str = "fsdp2",
    base: str = "auto",
    *,
    ranks_per_node: int | None = None,
    resident: float = 0.0,
    optimizer_state: str = "auto",
    device: torch.device | str | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> TrainedReplica:
    """Distribute the frozen base of `model` over ranks and make its adapters a replica.

    Collective. A base that is sharded already stays as it is, whatever `engine` and `base` say.
    Without an initialised process group there is one process, and nothing is distributed.

    Args:
        engine: `"fsdp2"` or `"zero3"`.
        base: where W0 is stored: `"none"` (a whole copy on each rank), `"node"` or `"world"`.
            `"auto"` is the cheapest of these that fits, as in YAML. The activations of your loop
            are not known here, so W0, A and B with an AdamW state may take half of the memory that
            is free; name the base where you know better. `replica.engine.placement` has the choice.
        ranks_per_node: overrides LOCAL_WORLD_SIZE.
        resident: share of W0, 0 to 1, that stays gathered from its first use on: frozen weights are
            read-only, so this trades memory for bytes on the wire.
        optimizer_state: `"replicated"` (as is `"auto"`), or `"divided"`: each rank's optimizer
            stores the state of 1/ranks of the elements of A and B. Call
            `replica.attach_optimizer(optimizer)` once; its steps are collective then, and end with
            whole values on every rank. It must treat each element alone, as AdamW and SGD do.
            (`LoraPro` does not: on a replicated replica `attach_optimizer` distributes its pairs
            over ranks.) After `reduce_gradients` a rank has the mean gradient of its part only, and
            `.grad` of the parameters themselves is None.
        device: moves the model there, of a base that is sharded a shard at a time: on GPUs, this
            rank's own. Without it the model is sharded where it is, with a warning if that is the
            CPU beside a GPU. A base that is sharded already stays where it is.
        reduce_dtype: in which gradients are sent, `torch.bfloat16` for half of the bytes; sums are
            made in the gradients' own dtype. None: it is sent, too.

    Returns:
        The replica; it is empty until adapters are attached.

    Raises:
        UsageError: a setting is unknown or does not fit the ranks, or the adapters were partitioned
            by another library.
    """
    if type(model).__name__ == "DeepSpeedEngine":
        raise UsageError(
            "shard: this is a DeepSpeed engine, which does not reduce or step the adapters; pass "
            "engine.module, and call engine.module in the training loop"
        )
    check_engine(model)
    topology = Topology.current(ranks_per_node)
    divided_by = sharded_by(model)
    divided = state_is_divided(optimizer_state)
    if base == "auto":
        base = "world" if divided_by else _cheapest_base(model, engine, topology)
    placement = resolve_placement(divided_by or engine, base, topology)
    built = build_engine(placement, topology, sharded=divided_by)
    if divided_by is not None:
        place = None
    elif (place := None if device is None else torch.device(device)) is None:
        _warn_of_cpu(model, topology)
    _warn_of_randomness(model)
    replica = replicate(
        model, built, divided=divided, device=place, reduce_dtype=_sendable(reduce_dtype)
    )
    if resident:
        groups = frozen_groups(replica.engine.groups(model))
        room = resident * sum(group.nbytes for group in groups)
        for group in worth_holding(groups, model):
            room -= group.nbytes
            if room > -1:
                replica.engine.keep_gathered(model, [group.path])
    return replica


def _sendable(dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise UsageError(f"shard: reduce_dtype: expected torch.bfloat16 or None, got {dtype}")
    return None if dtype is torch.float32 else dtype


def _warn_of_cpu(model: nn.Module, topology: Topology) -> None:
    """Warn of a model that would train on the CPU beside a GPU."""
    kinds = {parameter.device.type for parameter in model.parameters()}
    if kinds == {"cpu"} and torch.cuda.is_available():
        over = f", and sharded over gloo by {topology.world} ranks" if topology.world > 1 else ""
        said = (
            f"shard: the model is on the CPU{over}, beside a GPU; shard(model, device=…) moves it"
        )
        warnings.warn(said, stacklevel=3)


def _warn_of_randomness(model: nn.Module) -> None:
    """Warn of a base that draws at random in training mode."""
    if drawn := random_settings(model):
        said = (
            f"shard: in training mode the base draws at random ({', '.join(drawn)}), on each rank "
            "for itself, so that losses depend on ranks and micro-batches; load it with 0 for these"
        )
        warnings.warn(said, stacklevel=3)


def _cheapest_base(model: nn.Module, engine: str, topology: Topology) -> str:
    """The base that `auto` stands for, of a model that is whole on every rank. Collective."""
    groups = engine_class(resolve_placement(engine, "world", topology)).groups(model)
    largest = max((group.nbytes for group in groups), default=0)
    adapters = sum(p.nbytes for p in every_parameter(model).values())
    frozen = sum(p.nbytes for p in model.parameters()) - adapters
    device = next(model.parameters()).device
    return cheapest_base(frozen, largest, adapters, device, topology)
