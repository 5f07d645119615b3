"""`attach` on a model that may be sharded: adapters, their start from W0, and their replica."""

from __future__ import annotations

import warnings

from torch import nn

from dlora.errors import UsageError
from dlora.lora.attach import attach as attach_adapters
from dlora.lora.attach import attachment_of, await_start
from dlora.lora.config import LoraConfig
from dlora.lora.init import INITS
from dlora.lora.names import by_name
from dlora.lora.several import DEFAULT
from dlora.lora.whole_weights import plain_weights
from dlora.methods.matrix_init import Started, start_from_weights
from dlora.methods.trained_replica import replica_of
from dlora.sharding.engines.protocol import is_divided
from dlora.sharding.topology import Topology


def attach(
    model: nn.Module, config: LoraConfig, *, name: str = DEFAULT, trained: bool = True
) -> nn.Module:
    """Put adapters on `model` in place, before or after `shard`, and return the model.

    After `shard` it is collective: rank 0's A and B are broadcast. So it is wherever there is a
    process group with an initialisation that starts from W0, whose layers are spread over ranks.
    One that starts from gradients waits for `start_from_gradients`. See `dlora.lora.attach.attach`.

    Raises:
        UsageError: as there, or A and B start from a W0 that was not sharded by `dlora.shard`.
    """
    init = INITS[config.init_lora_weights]
    if name != DEFAULT and init.needs == "gradient":
        raise UsageError(
            f"init_lora_weights: {init.name} starts the adapter without a name alone; attach it so "
            "and rename it, or start otherwise"
        )
    attach_unstarted(model, config, name=name, trained=trained)
    with by_name(model, name):
        for line in attachment_of(model).left:
            warnings.warn(line, stacklevel=3)  # of the caller of `dlora.attach`
        if init.needs == "gradient":
            await_start(model)
        if init.needs == "weight" and next(model.parameters()).device.type != "meta":
            warn_of_left(start_adapters(model), stacklevel=4)
    return model


def attach_unstarted(
    model: nn.Module,
    config: LoraConfig,
    *,
    residual: bool = False,
    name: str = DEFAULT,
    trained: bool = True,
) -> None:
    """`attach` without the start from W0: A and B stay as they were drawn at random.

    Args:
        residual: the base was packed as the residual W0 − s·B0·A0.

    Raises:
        UsageError: as for `attach`.
    """
    replica = replica_of(model)
    needs = INITS[config.init_lora_weights].needs
    if replica is None and needs == "weight" and any(map(is_divided, model.parameters())):
        raise UsageError(
            f"init_lora_weights: {config.init_lora_weights} starts from whole weights, and this "
            "base is sharded; call dlora.shard first"
        )
    whole_weights = replica.engine.gather_module if replica else None
    attach_adapters(
        model, config, whole_weights=whole_weights, residual=residual, name=name, trained=trained
    )
    if replica is not None:
        replica.join(name)


def start_adapters(model: nn.Module) -> Started:
    """Start the adapters of a model from its W0, divided or whole. Collective."""
    replica = replica_of(model)
    if replica is None:
        return start_from_weights(model, Topology.current(), plain_weights("init_lora_weights"))
    return start_from_weights(model, replica.topology, replica.engine.gather_module, replica.wire)


def warn_of_left(started: Started, stacklevel: int = 3) -> None:
    """Warn of layers that start as usual, because their matrix lacks rank."""
    if started.left:
        warnings.warn(str(started), stacklevel=stacklevel)
