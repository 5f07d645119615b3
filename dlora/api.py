"""The calls of a training loop of one's own: they join the mathematics and the distribution."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dlora.errors import UsageError
from dlora.lora.attach import attach as attach_adapters
from dlora.lora.attach import (
    attachment_of,
    frozen_tensors,
    named_adapters,
    trainable_parameters,
)
from dlora.lora.config import LoraConfig
from dlora.lora.init import INITS
from dlora.lora.variants.adalora import AdaLoraConfig
from dlora.lora.whole_weights import plain_weights
from dlora.methods.adalora import RankAllocator
from dlora.methods.lora_ga import GradientEstimate, LossOf
from dlora.methods.matrix_init import Started, start_from_weights
from dlora.optim.groups import parameter_groups
from dlora.optim.lora_pro import Pair
from dlora.plan.own_loop import cheapest_base
from dlora.sharding.counts import whole_number
from dlora.sharding.engines.gather_groups import frozen_groups, worth_holding
from dlora.sharding.engines.protocol import (
    Engine,
    build_engine,
    engine_class,
    is_divided,
    sharded_by,
)
from dlora.sharding.replica.optimizer_state import States, state_is_divided, states_of
from dlora.sharding.replica.replica import Reduced, Replica
from dlora.sharding.topology import Topology, resolve_placement

_RECORD = "dlora_replica"


class TrainedReplica(Replica):
    """The replica of a model's adapters together with the engine that shards its base.

    Attributes:
        allocator: AdaLoRA's, which goes along with every step; None for other adapters.
    """

    def __init__(self, engine: Engine, model: nn.Module, *, divided: bool = False) -> None:
        super().__init__(engine.topology, engine.wire, divided=divided)
        self.engine, self._model = engine, model
        self.allocator: RankAllocator | None = None

    def reduce_gradients(
        self,
        tokens: int | Tensor | None = None,
        *,
        scalars: Mapping[str, float] | None = None,
        each: int = 0,
    ) -> Reduced:
        """See `Replica.reduce_gradients`; the step's passes are over, so W0 is freed as well."""
        self.release()
        if self.named and attachment_of(self._model).unstarted:
            raise UsageError(
                "init_lora_weights: lora_ga starts from gradients; call "
                "dlora.start_from_gradients(model, batches, loss_of) before the first step"
            )
        if self.allocator is not None:
            self.allocator.regularise(1 if tokens is None else whole_number(tokens))
        return super().reduce_gradients(tokens, scalars=scalars, each=each)

    def leave_out(self, optimizer: Optimizer) -> None:
        """In the place of an optimizer step that is not made: AdaLoRA's schedule goes on."""
        if self.allocator is not None:
            self.allocator.advance(optimizer)

    def release(self) -> None:
        """Free W0 that passes without a reduction after them (evaluation) left gathered."""
        self.engine.free_gathered(self._model)

    @property
    def frozen(self) -> dict[str, Tensor]:
        """What the adapters have beside what is trained: the factors of their offsets, by name."""
        return frozen_tensors(self._model)

    def states(self, optimizer: Optimizer) -> dict[str, States]:
        """What this rank keeps beside the adapters, by the name of its file in a checkpoint."""
        kept = {"optimizer": states_of(optimizer, self.optimized)}
        return kept | ({"scorer": self.allocator.averages()} if self.allocator else {})

    def allocation(self) -> dict[str, Any] | None:
        """What a checkpoint records of AdaLoRA's triplets."""
        return self.allocator.record() if self.allocator else None

    @property
    def final_budget(self) -> int | None:
        """What AdaLoRA's budget comes to."""
        return self.allocator.schedule.final if self.allocator else None

    def figures(self) -> dict[str, Any]:
        """What a line of the metrics holds of the last step beside the loss."""
        return self.allocator.figures() if self.allocator else {}

    @property
    def pairs(self) -> list[Pair]:
        """A and B of every adapter with its scale, for `dlora.optim.lora_pro.LoraPro`.

        Raises:
            UsageError: an adapter has a factor beside these.
        """
        found = []
        for path, _, adapter in named_adapters(self._model):
            pair = Pair(adapter.lora_A, adapter.lora_B, adapter.scaling)
            for name, other in adapter.named_parameters():
                # A magnitude, one number for each row of the host's weight, acts on their product.
                is_magnitude = other.ndim == 1 and other.numel() in pair.sizes[:2]
                if other is not pair.A and other is not pair.B and not is_magnitude:
                    raise UsageError(f"LoraPro: the adapter at {path} has {name} beside A and B")
            found.append(pair)
        return found

    def parameter_groups(
        self, lr: float, *, loraplus_lr_ratio: float = 1.0, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Groups for a torch optimizer; see `dlora.optim.groups.parameter_groups`.

        They are the same on every rank. Where the optimizer state is divided they hold this rank's
        parts of the parameters, grouped as the whole ones are.
        """
        groups = parameter_groups(
            self.named, lr=lr, loraplus_lr_ratio=loraplus_lr_ratio, weight_decay=weight_decay
        )
        optimized = {id(whole): self.optimized[name] for name, whole in self.named.items()}
        for group in groups:
            group["params"] = [optimized[id(whole)] for whole in group["params"]]
        return groups


def attach(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Put adapters on `model` in place, before or after `shard`, and return the model.

    After `shard` it is collective: rank 0's A and B are broadcast. So it is wherever there is a
    process group with an initialisation that starts from W0, whose layers are spread over ranks.
    One that starts from gradients waits for `start_from_gradients`. See `dlora.lora.attach.attach`.

    Raises:
        UsageError: as there, or A and B start from a W0 that `shard` has not seen the parts of.
    """
    attach_unstarted(model, config)
    init = attachment_of(model).init
    attachment_of(model).unstarted = init.needs == "gradient"
    if init.needs == "weight" and next(model.parameters()).device.type != "meta":
        _warn_of_left(start_adapters(model))
    return model


def attach_unstarted(model: nn.Module, config: LoraConfig, *, residual: bool = False) -> None:
    """`attach`, but that A and B are as drawn also where they are to start from a matrix.

    Args:
        residual: the base was packed without what they start from.
    """
    replica: TrainedReplica | None = model.__dict__.get(_RECORD)
    needs = INITS[config.init_lora_weights].needs
    if replica is None and needs == "weight" and any(map(is_divided, model.parameters())):
        raise UsageError(
            f"init_lora_weights: {config.init_lora_weights} starts from whole weights, and this "
            "base is sharded; call dlora.shard first"
        )
    whole_weights = replica.engine.gather_module if replica else None
    attach_adapters(model, config, whole_weights=whole_weights, residual=residual)
    if replica is not None:
        _take_over(replica, model)


def start_adapters(model: nn.Module) -> Started:
    """Start the adapters of a model from its W0, divided or whole. Collective."""
    replica: TrainedReplica | None = model.__dict__.get(_RECORD)
    if replica is None:
        return start_from_weights(model, Topology.current(), plain_weights("init_lora_weights"))
    return start_from_weights(model, replica.topology, replica.engine.gather_module, replica.wire)


def start_from_gradients(model: nn.Module, batches: Iterable[Any], loss_of: LossOf) -> Started:
    """Start adapters with `init_lora_weights="lora_ga"` from the gradient over some batches.

    Collective, once the model is sharded, if it is to be. No gradient is left on any parameter.

    Args:
        batches: of this rank; some hundred sequences in all are enough. Four passes are made.
        loss_of: `loss_of(model, batch)`, the loss summed over the batch's target tokens. Means are
            added up as they are, whatever they are the mean of.

    Raises:
        UsageError: the adapters do not start from gradients, there are none, or a rank has no
            batches.
    """
    replica: TrainedReplica | None = model.__dict__.get(_RECORD)
    topology = replica.topology if replica else Topology.current()
    estimate = GradientEstimate(model, topology, replica.wire if replica else None)
    estimate.run(list(batches), loss_of)
    if replica is not None:
        replica.release()
    started = estimate.start()
    _warn_of_left(started)
    return started


def shard(
    model: nn.Module,
    engine: str = "fsdp2",
    base: str = "auto",
    *,
    ranks_per_node: int | None = None,
    resident: float = 0.0,
    optimizer_state: str = "auto",
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

    Raises:
        UsageError: a setting is unknown or does not fit the ranks, or something else has divided
            the adapters.
    """
    if type(model).__name__ == "DeepSpeedEngine":
        raise UsageError(
            "shard: this is a DeepSpeed engine; pass its module (engine.module), and call that in "
            "the loop: the engine itself reduces and steps only what an optimizer section trains"
        )
    topology = Topology.current(ranks_per_node)
    divided_by = sharded_by(model)
    divided = state_is_divided(optimizer_state)
    if base == "auto":
        base = "world" if divided_by else _cheapest_base(model, engine, topology)
    placement = resolve_placement(divided_by or engine, base, topology)
    built = build_engine(placement, topology, sharded=divided_by)
    replica = replicate(model, built, divided=divided)
    if resident:
        groups = frozen_groups(replica.engine.groups(model))
        room = resident * sum(group.nbytes for group in groups)
        for group in worth_holding(groups, model):
            room -= group.nbytes
            if room > -1:
                replica.engine.keep_gathered(model, [group.path])
    return replica


def _cheapest_base(model: nn.Module, engine: str, topology: Topology) -> str:
    """The base that `auto` stands for, of a model that is whole on every rank. Collective."""
    groups = engine_class(resolve_placement(engine, "world", topology)).groups(model)
    largest = max((group.nbytes for group in groups), default=0)
    trained = trainable_parameters(model) if hasattr(model, "dlora") else {}
    adapters = sum(p.nbytes for p in trained.values())
    frozen = sum(p.nbytes for p in model.parameters()) - adapters
    device = next(model.parameters()).device
    return cheapest_base(frozen, largest, adapters, device, topology)


def replicate(model: nn.Module, engine: Engine, *, divided: bool = False) -> TrainedReplica:
    """Hand the frozen base of `model` to an engine and make its adapters, if any, a replica.

    What `shard` does once the engine is chosen; for callers that loaded the base through an engine.
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
    engine.shard(model, ignored=named.values())
    engine.after_load(model)
    replica = TrainedReplica(engine, model, divided=divided)
    model.__dict__[_RECORD] = replica
    if named:
        _take_over(replica, model)
    return replica


def _warn_of_left(started: Started) -> None:
    if started.left:
        warnings.warn(str(started), stacklevel=3)


def _take_over(replica: TrainedReplica, model: nn.Module) -> None:
    named = trainable_parameters(model)
    replica.own(named)
    replica.engine.set_trainable(model, named.values())
    if isinstance(attachment_of(model).config, AdaLoraConfig):
        replica.allocator = RankAllocator(model, replica)
