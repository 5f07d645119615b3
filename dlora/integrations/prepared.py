"""What every integration does with the model that it is given: adapters, shards, one replica."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dlora import LoraConfig, UsageError, attach, attached, shard
from dlora.api import TrainedReplica, replica_of


def prepared_model(
    model: Any,
    device: torch.device,
    dlora: LoraConfig | None,
    sharding: Mapping[str, Any] | None,
    replica: TrainedReplica | None = None,
) -> TrainedReplica:
    """Attach and shard what the caller has not; collective. Returns the replica of the adapters.

    Raises:
        UsageError: there is nothing to train, or something was asked for that was done already.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: expected a model, got {model!r}")
    if hasattr(model, "peft_config"):
        raise UsageError(
            "model: it has PEFT's adapters, which dlora does not train; pass the model as it was "
            "before get_peft_model, and the configuration as dlora="
        )
    if dlora is not None:
        attach(model, dlora)
    check_names(model)
    found = replica or replica_of(model)
    if found is None:
        settings = dict(sharding or {})
        unknown = settings.keys() - (inspect.signature(shard).parameters.keys() - {"model"})
        if unknown:
            raise UsageError(f"sharding: {min(unknown)!r} is no argument of dlora.shard")
        found = shard(model, **{"device": device} | settings)
    elif sharding:
        raise UsageError("sharding: this model has been sharded by dlora.shard already")
    if not found.named:
        raise UsageError(
            "dlora: the model has no adapters; pass dlora=LoraConfig(...), or call "
            "dlora.attach(model, ...) before"
        )
    # Generation under W0 in shards goes on until the longest sequence of all ranks is done.
    model._is_fsdp_managed_module = found.engine.placement.shard_size > 1  # type: ignore[assignment]
    return found


def check_names(model: nn.Module) -> None:
    """Raise a `UsageError` about trained adapters with names, which would not be stepped or saved.

    Frozen ones stay where they are; a checkpoint is of the adapters without a name.
    """
    named = [name for name, a in attached(model).items() if a.trained and name != "default"]
    if named:
        raise UsageError(
            f"model: trains adapters by name ({', '.join(named)}), which no integration steps or "
            "saves; attach the trained ones without a name, or the others with is_trainable=False"
        )
