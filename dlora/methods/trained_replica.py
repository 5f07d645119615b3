"""The replica of a model's adapters, with the engine of its base and the state of its method."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from dlora.errors import UsageError
from dlora.lora.attach import (
    attachment_of,
    children_of,
    frozen_tensors,
    is_unstarted,
    named_adapters,
    trainable_parameters,
)
from dlora.lora.made_class import REPLICA
from dlora.lora.method_state import MethodState
from dlora.lora.parameters import ParameterAdapter
from dlora.lora.variants import VARIANTS
from dlora.optim.groups import parameter_groups
from dlora.optim.lora_pro import Pair
from dlora.sharding.counts import whole_number
from dlora.sharding.engines.protocol import Engine, is_divided
from dlora.sharding.replica.optimizer_state import States, states_of
from dlora.sharding.replica.replica import Reduced, Replica
from dlora.sharding.replica.step_scalars import Scalar


class TrainedReplica(Replica):
    """A replica that knows its model.

    Args:
        engine: has the frozen base of the model.
        divided, reduce_dtype: as of `Replica`.

    Attributes:
        method: what the adapters' method computes and saves beside them; see `MethodState`.
    """

    def __init__(self, engine: Engine, model: nn.Module, **settings: Any) -> None:
        super().__init__(engine.topology, engine.wire, **settings)
        self.engine, self._model = engine, model
        self.method = MethodState()

    def take_over(self) -> None:
        """Own the adapters that the model has by now. Collective: rank 0's values are broadcast."""
        named = trainable_parameters(self._model)
        self.own(named)
        for child in children_of(self._model):
            child.replicated = True
        self.engine.set_trainable(self._model, named.values())
        kind = _state_class(VARIANTS[attachment_of(self._model).config.variant].state_class)
        if kind is not MethodState:
            self.method = kind(self._model, self)  # type: ignore[call-arg]
            _follow_steps(self)

    def reduce_gradients(
        self,
        tokens: int | Tensor | None = None,
        *,
        scalars: Mapping[str, Scalar] | None = None,
        each: int = 0,
    ) -> Reduced:
        """See `Replica.reduce_gradients`; the step's passes are over, so W0 is freed as well.

        Raises:
            UsageError: the adapters still wait for `dlora.start_from_gradients`.
        """
        self.release()
        if self.named and is_unstarted(self._model):
            raise UsageError(
                "init_lora_weights: lora_ga starts from gradients; call "
                "dlora.start_from_gradients(model, batches, loss_of) before the first step"
            )
        self.method.before_reduce(1 if tokens is None else whole_number(tokens))
        return super().reduce_gradients(tokens, scalars=scalars, each=each)

    def skip_step(self, optimizer: Optimizer) -> None:
        """Call it in place of a skipped optimizer step, so that the method's schedule advances."""
        self.method.after_step(optimizer, skipped=True)

    def release(self) -> None:
        """Free the W0 that passes without a reduction, as in evaluation, left gathered."""
        self.engine.free_gathered(self._model)

    @property
    def frozen(self) -> dict[str, Tensor]:
        """The adapters' tensors beside what is trained: the factors of their offsets, by name."""
        return frozen_tensors(self._model)

    def states(self, optimizer: Optimizer) -> dict[str, States]:
        """This rank's tensors beside the adapters, by the name of their file in a checkpoint."""
        return {"optimizer": states_of(optimizer, self.optimized), **self.method.tensors()}

    @property
    def pairs(self) -> list[Pair]:
        """A and B of every adapter with its scale, for `dlora.optim.lora_pro.LoraPro`.

        Raises:
            UsageError: an adapter has another factor.
        """
        found = []
        for path, _, adapter in named_adapters(self._model):
            if isinstance(adapter, ParameterAdapter) and adapter.experts is not None:
                raise UsageError(f"LoraPro: the adapter at {path} has a pair for each expert")
            pair = Pair(adapter.lora_A, adapter.lora_B, adapter.scaling)
            for name, other in adapter.named_parameters():
                # A magnitude, one number for each row of the layer's weight, acts on their product.
                is_magnitude = other.ndim == 1 and other.numel() in pair.sizes[:2]
                if other is not pair.A and other is not pair.B and not is_magnitude:
                    raise UsageError(f"LoraPro: the adapter at {path} has {name} beside A and B")
            found.append(pair)
        return found

    def parameter_groups(
        self, lr: float, *, loraplus_lr_ratio: float = 1.0, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Groups for a torch optimizer; see `dlora.optim.groups.parameter_groups`.

        They are the same on every rank. Where the optimizer state is divided they have this rank's
        parts of the parameters, grouped as the whole ones are.
        """
        groups = parameter_groups(
            self.named, lr=lr, loraplus_lr_ratio=loraplus_lr_ratio, weight_decay=weight_decay
        )
        optimized = {id(whole): self.optimized[name] for name, whole in self.named.items()}
        for group in groups:
            group["params"] = [optimized[id(whole)] for whole in group["params"]]
        return groups


def replica_of(model: nn.Module) -> TrainedReplica | None:
    """The replica of a model; None before `dlora.shard`."""
    return model.__dict__.get(REPLICA)


def replicate(
    model: nn.Module,
    engine: Engine,
    *,
    divided: bool = False,
    device: torch.device | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> TrainedReplica:
    """Give the frozen base of `model` to an engine and make its adapters, if any, a replica.

    What `dlora.shard` does once the engine is chosen; for callers that loaded the base through one.

    Args:
        device: where W0 and adapters come to lie; None: they stay where they are.
        reduce_dtype: as of `Replica`.

    Raises:
        UsageError: an adapter's parameter is divided over ranks.
    """
    named = trainable_parameters(model) if hasattr(model, "dlora") else {}
    for name, parameter in named.items():
        if is_divided(parameter):
            raise UsageError(
                f"shard: {name} is divided over ranks; attach after the base is sharded (after "
                "deepspeed.initialize), or keep the adapters out (fully_shard's ignored_params)"
            )
    if not named:
        model.requires_grad_(False)
    engine.shard(model, named.values(), device)
    for tensor in (*named.values(), *model.buffers()) if device is not None else ():
        tensor.data = tensor.data.to(device)
    engine.after_load(model)
    replica = TrainedReplica(engine, model, divided=divided, reduce_dtype=reduce_dtype)
    model.__dict__[REPLICA] = replica
    if named:
        replica.take_over()
    return replica


def _state_class(named: type[MethodState] | str) -> type[MethodState]:
    """A method's state class, imported where it is named `"module:class"`."""
    if isinstance(named, type):
        return named
    module, _, name = named.partition(":")
    return getattr(importlib.import_module(module), name)


_followed: weakref.WeakSet[TrainedReplica] = weakref.WeakSet()
_following = False


def _follow_steps(replica: TrainedReplica) -> None:
    """Let every step of an optimizer over the replica's parameters end with `after_step`.

    Through torch's hook for all optimizers, since the user may make the optimizer at any time. It
    is one hook for all replicas, and stays: none can be removed while torch goes through them.
    """
    global _following
    _followed.add(replica)
    if not _following:
        register_optimizer_step_post_hook(_after_any_step)
        _following = True


def _after_any_step(optimizer: Optimizer, *_: Any) -> None:
    for replica in list(_followed):
        own = {id(parameter) for parameter in replica.optimized.values()}
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            replica.method.after_step(optimizer)
