"""dlora under Accelerate: `prepare` in place of `accelerator.prepare`, and the loop stays as it is.

model, optimizer, loader = prepare(accelerator, model, optimizer, loader)

accelerator.backward          reduces after the last backward pass of a step
accelerator.clip_grad_norm_   clips the norm over all trained tensors
save_state, load_state        the adapter in PEFT's layout in place of the model's weights
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from dlora import LoraConfig, UsageError
from dlora.api import TrainedReplica
from dlora.integrations import adapter
from dlora.integrations.one_step import reduce_gradients
from dlora.integrations.prepared import prepared_model
from dlora.integrations.whole_state import WholeState

__all__ = ["prepare"]


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    *others: Any,
    dlora: LoraConfig | None = None,
    sharding: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """`accelerator.prepare` for a model with adapters: nothing is wrapped around it. Collective.

    Args:
        optimizer: made of `replica.parameter_groups`, or of the adapters' parameters where its
            state is not divided over ranks.
        others: loaders and schedules.
        dlora: adapters to attach first; None: the model has them.
        sharding: arguments of `dlora.shard` by name; None: it has been sharded, or the defaults.

    Returns:
        What `accelerator.prepare` returns: the model, the optimizer, and the others in their order.

    Raises:
        UsageError: the accelerator wraps models in FSDP or DeepSpeed, or prepares another model of
            dlora already.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UsageError(
            "prepare: this Accelerator wraps models in FSDP or DeepSpeed, and dlora shards them by "
            "itself; make it without a plugin"
        )
    if isinstance(vars(accelerator).get("backward"), _Backward):
        raise UsageError("prepare: this Accelerator has a model of dlora already")
    replica = prepared_model(model, accelerator.device, dlora, sharding)
    WholeState(replica, optimizer)
    backward = _Backward(accelerator, replica, optimizer)
    accelerator.backward = backward
    accelerator.clip_grad_norm_ = backward.clip
    prepared = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    _Files(accelerator, model, replica, prepared)
    return accelerator.prepare(prepared, optimizer, *others)


class _Backward:
    """`accelerator.backward`, which ends the last pass of a step with the reduction."""

    def __init__(
        self, accelerator: Accelerator, replica: TrainedReplica, optimizer: Optimizer
    ) -> None:
        self._accelerator, self._replica, self._optimizer = accelerator, replica, optimizer
        self._plain, self._plain_clip = accelerator.backward, accelerator.clip_grad_norm_
        self._norm = 0.0

    def __call__(self, loss: Tensor, **kwargs: Any) -> None:
        self._plain(loss, **kwargs)
        if self._accelerator.sync_gradients:
            scaler = self._accelerator.scaler
            self._norm = reduce_gradients(self._replica, self._optimizer, scaler)

    def clip(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor | None:
        """`accelerator.clip_grad_norm_`: of all trained tensors, whichever of them are named."""
        named = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        own = {id(p) for p in (*self._replica.named.values(), *self._replica.optimized.values())}
        if not any(id(p) in own for p in named):
            return self._plain_clip(named, max_norm, norm_type)
        if norm_type != 2:
            raise UsageError(f"clip_grad_norm_: norm_type must be 2, got {norm_type}")
        self._accelerator.unscale_gradients()
        self._replica.clip(max_norm, self._norm)
        return torch.tensor(self._norm, device=self._accelerator.device)


class _Files:
    """The adapter in place of the model in `save_state` and `load_state`."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, replica: TrainedReplica, prepared: Any
    ) -> None:
        self._accelerator, self._model, self._replica = accelerator, model, replica
        self._prepared = prepared
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def _save(self, models: list[Any], weights: list[Any], output_dir: str) -> None:
        del weights[models.index(self._prepared)]
        settings = self._accelerator.project_configuration
        is_local = settings.save_on_each_node and self._accelerator.is_local_main_process
        if self._accelerator.is_main_process or is_local:
            adapter.save(self._model, self._replica, Path(output_dir))

    def _load(self, models: list[Any], input_dir: str) -> None:
        models.remove(self._prepared)
        adapter.load(self._model, self._replica, input_dir)
