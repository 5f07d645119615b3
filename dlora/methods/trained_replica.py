"""The replica of a model's adapters, with the engine of its base and the state of its method."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dlora.errors import UsageError
from dlora.lora.attach import (
    attachment_of,
    children_of,
    every_parameter,
    frozen_tensors,
    is_unstarted,
    named_adapters,
    trainable_parameters,
)
from dlora.lora.made_class import REPLICA
from dlora.lora.method_state import MethodState
from dlora.lora.names import attached, by_name
from dlora.lora.parameters import ParameterAdapter
from dlora.lora.several import DEFAULT
from dlora.lora.variants import VARIANTS
from dlora.methods.after_step import follow_steps
from dlora.optim.groups import parameter_groups
from dlora.optim.lora_pro import Pair
from dlora.sharding.engines.protocol import Engine, is_divided
from dlora.sharding.first_rank import from_first
from dlora.sharding.replica.frozen import same_on_every_rank
from dlora.sharding.replica.optimizer_state import States, states_of
from dlora.sharding.replica.replica import Replica

REFERENCE = "reference"  # the file of a checkpoint


class TrainedReplica(Replica):
    """A replica that knows its model.

    Args:
        engine: has the frozen base of the model.
        name: of the adapters that it is for.
        divided, reduce_dtype: as of `Replica`.

    Attributes:
        method: what the adapters' method computes and saves beside them; see `MethodState`.
        reference: copies of the trained tensors as they began, by name, where a policy is compared
            with them.
        others: of the replica for the adapters without a name: those of trained ones with a name.
        released_with: what `release` frees of other models.
    """

    def __init__(
        self, engine: Engine, model: nn.Module, *, name: str = DEFAULT, **settings: Any
    ) -> None:
        super().__init__(engine.topology, engine.wire, **settings)
        self.engine, self._model, self._name, self._settings = engine, model, name, settings
        self.method = MethodState()
        self.reference: dict[str, Tensor] = {}
        self.others: dict[str, TrainedReplica] = {}
        self.released_with: list[Callable[[], None]] = []

    def take_over(self, *, equal: bool = False) -> None:
        """Own the adapters that the model has by now. Collective: rank 0's values are broadcast.

        Args:
            equal: they have the same values on every rank already, so nothing is sent.
        """
        with by_name(self._model, self._name):
            self.own(trainable_parameters(self._model), equal=equal)
            for child in children_of(self._model):
                child.replicated = True
            trained = [p for p in every_parameter(self._model).values() if p.requires_grad]
            self.engine.set_trainable(self._model, trained)
            kind = _state_class(VARIANTS[attachment_of(self._model).config.variant].state_class)
            if kind is not MethodState:
                self.method = kind(self._model, self)  # type: ignore[call-arg]
                follow_steps(self)

    def join(self, name: str, *, equal: bool = False) -> None:
        """Make the adapters of a name the same on every rank: one broadcast of rank 0's values.

        Trained ones get a replica of their own, `replica_of(model, name)`.

        Args:
            equal: as of `take_over`.
        """
        if name == DEFAULT:
            self.take_over(equal=equal)
        elif attached(self._model)[name].trained:
            settings = self._settings | {"reduction": self._reduction}
            replica = TrainedReplica(self.engine, self._model, name=name, **settings)
            replica.take_over(equal=equal)
            self.others[name] = replica
        elif not equal:
            self.share(name)

    def share(self, name: str) -> None:
        """Give every rank rank 0's values of the adapters of a name: one broadcast.

        Trained ones stay where their replica has them.
        """
        if name in self.others:
            if self.topology.world > 1:
                dist.broadcast(self.others[name].values, src=0)
            return
        same_on_every_rank(trainable_parameters(self._model, name), self.topology)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """See `dlora.sharding.first_rank.from_first`."""
        return from_first(self.topology, make)

    def leave(self, name: str) -> None:
        """Forget the adapters of a name, which have been removed."""
        self.others.pop(name, None)
        if name == DEFAULT and self.named:
            self.method = MethodState()
            self.disown()

    def before_reduction(self, tokens: int) -> None:
        """The step's passes are over: W0 is freed, and the method adds to the gradients.

        Raises:
            UsageError: the adapters still wait for `dlora.start_from_gradients`.
        """
        self.release()
        if self.named and self._is_unstarted():
            raise UsageError(
                "init_lora_weights: lora_ga starts from gradients; call "
                "dlora.start_from_gradients(model, batches, loss_of) before the first step"
            )
        self.method.before_reduce(tokens)

    def sum_over_ranks(self, flat: Tensor) -> Tensor:
        """Σ over ranks of a flat tensor, the same bits on each. Collective."""
        return self._reduction.sum_of(flat)

    def skip_step(self, optimizer: Optimizer) -> None:
        """Call it in place of a skipped optimizer step, so that the method's schedule advances."""
        self.method.after_step(optimizer, skipped=True)

    def release(self) -> None:
        """Free the W0 that passes without a reduction, as in evaluation, left gathered."""
        self.engine.free_gathered(self._model)
        for release in self.released_with:
            release()

    @property
    def frozen(self) -> dict[str, Tensor]:
        """The adapters' tensors beside what is trained: the factors of their offsets, by name."""
        with by_name(self._model, self._name):
            return frozen_tensors(self._model)

    def states(self, optimizer: Optimizer) -> dict[str, States]:
        """This rank's tensors beside the adapters, by the name of their file in a checkpoint."""
        own = {"optimizer": states_of(optimizer, self.optimized), **self.method.tensors()}
        if self.reference:
            parts = {n: self.strategy.local_part(n, t) for n, t in self.reference.items()}
            own[REFERENCE] = {n: {"start": p} for n, p in parts.items() if p is not None}
        return own

    def load_reference(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load (`<parameter>.start`, whole tensor) of a checkpoint."""
        for key, tensor in tensors:
            self.reference[key.rpartition(".")[0]].copy_(tensor)

    @property
    def pairs(self) -> list[Pair]:
        """A and B of every adapter with its scale, for `dlora.optim.lora_pro.LoraPro`.

        Raises:
            UsageError: an adapter has another factor.
        """
        found = []
        with by_name(self._model, self._name):
            adapters = list(named_adapters(self._model))
        for path, _, adapter in adapters:
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

    def _is_unstarted(self) -> bool:
        with by_name(self._model, self._name):
            return is_unstarted(self._model)


def replica_of(model: nn.Module, name: str = DEFAULT) -> TrainedReplica | None:
    """The replica of the adapters of a model; None before `dlora.shard`.

    Args:
        name: of trained adapters; frozen ones have none.

    Raises:
        UsageError: the model is sharded, and no trained adapters have this name.
    """
    replica: TrainedReplica | None = model.__dict__.get(REPLICA)
    if replica is None or name == DEFAULT:
        return replica
    if name not in replica.others:
        raise UsageError(f"replica_of: the model trains no adapters named {name!r}")
    return replica.others[name]


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
    named = every_parameter(model)
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
    for name in attached(model):
        replica.join(name)
    return replica


def _state_class(named: type[MethodState] | str) -> type[MethodState]:
    """A method's state class, imported where it is named `"module:class"`."""
    if isinstance(named, type):
        return named
    module, _, name = named.partition(":")
    return getattr(importlib.import_module(module), name)
