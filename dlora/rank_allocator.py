"""AdaLoRA on a replica: one budget of triplets over all matrices, and the same mask on every rank.

    before the reduction   the regulariser's gradient is added: it comes out once, not once per rank
    after optimizer.step   averages follow w and g ─> scores, one sum over ranks ─> mask ─> λ = 0
    after the last mask    A, B and E shrink to the triplets that are left

Gradients are global means by then, so every rank computes the same averages of its share of the
elements. Both moments come by themselves: the first with `reduce_gradients`, the second with the
step of whatever optimizer holds the adapters.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from dlora.lora import importance, orthogonality
from dlora.lora.attach import attachment_of, named_adapters
from dlora.lora.budget import best
from dlora.lora.hosts import CHILD
from dlora.lora.variants.adalora import TRIPLET_DIM, AdaLoraAdapter, AdaLoraConfig
from dlora.sharding.replica import Replica
from dlora.sharding.share import Held, ReplicaError, States


@dataclass(frozen=True)
class Triplets:
    """The triplets of one module among all: `place` in the flat vector of scores."""

    path: str
    adapter: AdaLoraAdapter
    place: slice

    @property
    def prefix(self) -> str:
        """Of the names of its parameters."""
        return f"{self.path}.{CHILD}."


class RankAllocator:
    """Scores, masks and finally removes triplets, once per optimizer step.

    Args:
        model: attached with an `AdaLoraConfig`.
        replica: owns its adapters.

    Attributes:
        step: t, optimizer steps that have been made.
        schedule: of the budget, over all modules, in `budget_unit`.
        ranks: of each module, as the last mask left them.
        masks: the same for every mask of this start, by step.
        orth_loss: γ·R of the last reduction, a scalar.
    """

    _singular: Tensor  # where the λ of all triplets lie in the replica's values

    def __init__(self, model: nn.Module, replica: Replica) -> None:
        config = attachment_of(model).config
        assert isinstance(config, AdaLoraConfig)
        self.config, self._replica = config, replica
        self._modules: list[Triplets] = []
        count = 0
        for path, _, adapter in named_adapters(model):
            assert isinstance(adapter, AdaLoraAdapter)
            self._modules.append(Triplets(path, adapter, slice(count, count + adapter.r)))
            count += adapter.r
        self._unit_costs = [_cost(module, config.budget_unit) for module in self._modules]
        self.schedule = config.schedule(
            sum(config.init_r * cost for cost in self._unit_costs),
            sum(config.target_r * cost for cost in self._unit_costs),
        )
        self.step, self.is_shrunk = 0, False
        self._left = [torch.arange(config.init_r) for _ in self._modules]
        self.masks: dict[int, dict[str, int]] = {}
        self.orth_loss = torch.zeros(())
        self._averages: dict[str, Tensor] = {}
        self._reductions = 0
        self._lay_out()
        _follow(self)

    # -- the two moments of a step --------------------------------------------------------------

    def regularise(self, weight: int) -> None:
        """Add `weight` times the gradient of γ·R to this rank's gradients, before the reduction.

        R is the same on every rank. With a rank's number of target tokens as its weight, the mean
        over all tokens of all ranks contains the gradient of γ·R exactly once.
        """
        self._reductions += 1
        if self._reductions > 2 and self.step == 0:
            raise ReplicaError(
                "adalora has seen two reductions of gradients and no step of an optimizer that "
                "holds the adapters: they must be stepped by a torch optimizer over "
                "replica.parameter_groups(...)"
            )
        gamma = self.config.orth_reg_weight
        if not (gamma and self._modules):
            return
        each = gamma / (2 * len(self._modules))
        norms = []
        for module in self._modules:
            for name in ("lora_A", "lora_B"):
                factor = module.adapter.get_parameter(name).detach()
                gradient = self._replica.gradient(module.prefix + name)
                dim = TRIPLET_DIM[name]
                norms.append(orthogonality.add_gradient(factor, dim, gradient, each * weight))
        self.orth_loss = each * torch.stack(norms).sum()

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Score, mask and shrink, as the schedule says of this step."""
        self.step += 1
        if self.is_shrunk:
            return
        self._stay_beside(self._replica.share.values.device)
        if self.schedule.scores(self.step):
            self._score()
        if self.schedule.masks(self.step):
            self._mask()
        if self.step == self.schedule.last:
            self._shrink(optimizer)

    def is_stepped_by(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds the adapters."""
        own = {id(part) for part in self._replica.optimized.values()}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def _stay_beside(self, device: torch.device) -> None:
        """Follow adapters that `model.to(device)` has moved."""
        if self._singular.device != device:
            self._singular = self._singular.to(device)
            self._averages = {kind: flat.to(device) for kind, flat in self._averages.items()}

    # -- scores and masks -----------------------------------------------------------------------

    def _lay_out(self) -> None:
        """Where this rank has what; the averages of all that it has start at 0."""
        held = self._replica.share.held()
        self._held = {
            module.prefix + name: held[module.prefix + name]
            for module in self._modules
            for name in TRIPLET_DIM
        }
        numel = sum(here.stop - here.start for here in self._held.values())
        offset, singular = 0, []
        for name, parameter in self._replica.named.items():
            if name.endswith(".lora_E") and name in self._held:
                singular.append(torch.arange(offset, offset + parameter.numel()))
            offset += parameter.numel()
        values = self._replica.share.values
        self._singular = torch.cat(singular or [torch.arange(0)]).to(values.device)
        kinds = importance.IMPORTANCES[self.config.importance]
        self._averages = {kind: values.new_zeros(numel) for kind in kinds}

    def _score(self) -> None:
        """Follow this step's weights and gradients; modules without a gradient keep theirs."""
        if not self._averages:
            return
        share, config = self._replica.share, self.config
        averages = [*self._averages.values(), None]
        for here in self._runs():
            importance.follow(
                share.values[here],
                share.gradients[here],
                averages[0][here],  # type: ignore[index]
                None if averages[1] is None else averages[1][here],
                beta1=config.beta1,
                beta2=config.beta2,
            )

    def _runs(self) -> Iterator[slice]:
        """The elements of modules that had a gradient, in runs as long as can be."""
        first = last = 0
        for module in self._modules:
            places = [self._held[module.prefix + name].place for name in TRIPLET_DIM]
            begin, end = min(p.start for p in places), max(p.stop for p in places)
            if not self._replica.present[f"{module.prefix}lora_E"]:
                if last > first:
                    yield slice(first, last)
                first = last = end
                continue
            first, last = (first, end) if last == begin else (begin, end)
        if last > first:
            yield slice(first, last)

    def _scores(self) -> Tensor:
        """S of all triplets, the same bits on every rank: [triplets]."""
        values = self._replica.share.values
        averages = [*self._averages.values(), None]
        if self._averages:
            elements = importance.element_scores(averages[0], averages[1])  # type: ignore[arg-type]
        scores = values.new_zeros(sum(module.adapter.r for module in self._modules))
        for module in self._modules:
            for name, dim in TRIPLET_DIM.items():
                here = self._held[module.prefix + name]
                if self._averages:
                    mine = elements[here.place]
                elif name == "lora_E":
                    mine = values[here.place].abs()
                else:
                    continue
                shape = module.adapter.get_parameter(name).shape
                scores[module.place] += importance.triplet_means(_whole(mine, here, shape), dim)
        return self._replica.share.join(scores)

    def _mask(self) -> None:
        """Keep the best triplets; the others' λ become 0."""
        costs = None
        if self.config.budget_unit == "params":
            each = zip(self._modules, self._unit_costs, strict=True)
            costs = [cost for module, cost in each for _ in range(module.adapter.r)]
        keep = best(self._scores(), self.schedule.budget(self.step), costs)
        self._replica.values.index_fill_(0, self._singular[~keep.to(self._singular.device)], 0.0)
        self._set_kept(keep)
        self.masks[self.step] = self.ranks

    def _set_kept(self, keep: Tensor) -> None:
        on_device = keep.to(self._singular.device)
        for i, module in enumerate(self._modules):
            self._left[i] = keep[module.place].nonzero().view(-1)
            module.adapter.kept = on_device[module.place]

    def _shrink(self, optimizer: Optimizer | None) -> None:
        """Only what is left goes on: in memory, in the optimizer's state and on the wire."""
        cuts = {
            module.prefix + name: cut
            for module, triplets in zip(self._modules, self._left, strict=True)
            for name, cut in module.adapter.cuts(triplets).items()
        }
        self._replica.resize(cuts, optimizer)
        for module in self._modules:
            module.adapter.shrunk()
        self._averages, self.is_shrunk = {}, True

    # -- what is seen and kept ------------------------------------------------------------------

    @property
    def ranks(self) -> dict[str, int]:
        """Triplets of each module that the last mask left."""
        return {m.path: len(left) for m, left in zip(self._modules, self._left, strict=True)}

    def figures(self) -> dict[str, Any]:
        """What a line of the metrics holds of the step."""
        ranks = list(self.ranks.values())
        spent = sum(r * cost for r, cost in zip(ranks, self._unit_costs, strict=True))
        figures = {
            "orth_loss": float(self.orth_loss),
            "budget": self.schedule.budget(self.step),
            "kept_ranks": sum(ranks),
        }
        return figures | ({"kept_params": spent} if self.config.budget_unit == "params" else {})

    def averages(self) -> States:
        """This rank's share of the averages, by parameter and name."""
        shapes = {name: p.shape for name, p in self._replica.optimized.items()}
        return {
            name: {
                kind: flat[here.place].view(shapes[name]) for kind, flat in self._averages.items()
            }
            for name, here in self._held.items()
            if self._averages
        }

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors: the triplets that are left, of the init_r."""
        named = zip(self._modules, self._left, strict=True)
        return {
            "shrunk": self.is_shrunk,
            "kept": {module.path: left.tolist() for module, left in named},
        }

    def take_up(self, step: int, record: Mapping[str, Any]) -> None:
        """Go on after `step` with the masks, and where it had shrunk the shapes, of a checkpoint.

        Before its tensors are loaded; an optimizer must not have any state yet.
        """
        self.step = step
        keep = torch.zeros(len(self._singular), dtype=torch.bool)
        for module in self._modules:
            keep[module.place][record["kept"][module.path]] = True
        self._set_kept(keep)
        if record["shrunk"]:
            self._shrink(None)

    @torch.no_grad()
    def load_averages(self, averages: Iterable[tuple[str, Tensor]]) -> None:
        """Take over averages, (`<parameter>.<name>`, whole tensor), of a checkpoint."""
        for key, whole in averages:
            name, _, kind = key.rpartition(".")
            mine = self._replica.share.part(name, whole)
            if mine is not None:
                self._averages[kind][self._held[name].place] = mine.reshape(-1).to(
                    self._averages[kind].device
                )


def keep_triplets(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Give adapters that no replica owns the masks or shapes that a checkpoint records."""
    for path, _, adapter in named_adapters(model):
        left = record["kept"].get(path)
        if left is None or not isinstance(adapter, AdaLoraAdapter):
            continue  # another run's: whoever compares the two says so
        if record["shrunk"]:
            adapter.shrink(torch.tensor(left, dtype=torch.int64))
        else:
            adapter.kept = torch.zeros(adapter.r, dtype=torch.bool)
            adapter.kept[left] = True


def _cost(module: Triplets, unit: str) -> int:
    """What a triplet of the module takes of the budget."""
    if unit == "triplets":
        return 1
    return module.adapter.lora_A.shape[1] + module.adapter.lora_B.shape[0] + 1


def _whole(part: Tensor, here: Held, shape: torch.Size) -> Tensor:
    """A tensor of the shape with the part at its place, and zeros elsewhere."""
    if here.stop - here.start == shape.numel():
        return part.view(shape)
    whole = part.new_zeros(shape.numel())
    whole[here.start : here.stop] = part
    return whole.view(shape)


def _follow(allocator: RankAllocator) -> None:
    """Let every step of the optimizer that holds the adapters end with `after_step`."""
    alive = weakref.ref(allocator)

    def after(optimizer: Optimizer, *_: Any) -> None:
        found = alive()
        if found is None:
            handle.remove()
        elif found.is_stepped_by(optimizer):
            found.after_step(optimizer)

    handle = register_optimizer_step_post_hook(after)
