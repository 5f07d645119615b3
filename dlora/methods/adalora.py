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
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from dlora.errors import UsageError
from dlora.lora.adalora import orthogonality
from dlora.lora.adalora.budget import best
from dlora.lora.attach import attachment_of, named_adapters
from dlora.lora.variants.adalora import TRIPLET_DIM, AdaLoraAdapter, AdaLoraConfig
from dlora.methods.adalora_scores import Triplets, TripletScores
from dlora.sharding.replica.optimizer_state import ReplicaError, States
from dlora.sharding.replica.replica import Replica


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
        in_triplets = config.budget_unit == "triplets"
        self._unit_costs = [1 if in_triplets else module.size for module in self._modules]
        self.schedule = config.schedule(
            sum(config.init_r * cost for cost in self._unit_costs),
            sum(config.target_r * cost for cost in self._unit_costs),
        )
        self.step = 0
        self._scores: TripletScores | None = TripletScores(self._modules, replica, config)
        self._left = [torch.arange(config.init_r) for _ in self._modules]
        self.masks: dict[int, dict[str, int]] = {}
        self.orth_loss = torch.zeros(())
        self._reductions = 0
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
        if self._scores is not None and self.schedule.scores(self.step + 1):
            self._scores.follow()
        self.advance(optimizer)

    @torch.no_grad()
    def advance(self, optimizer: Optimizer) -> None:
        """Mask and shrink, as the schedule says of this step, by the scores that there are."""
        self.step += 1
        if self._scores is None:
            return
        if self.schedule.masks(self.step):
            self._mask(self._scores.all())
        if self.step == self.schedule.last:
            self._shrink(optimizer)

    def is_stepped_by(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds the adapters.

        Raises:
            ReplicaError: it holds some of them only: a step of all would be counted twice.
        """
        names = self._replica.optimized
        own = {id(names[m.prefix + name]) for m in self._modules for name in TRIPLET_DIM}
        held = own & {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held and held != own:
            raise ReplicaError(
                f"an optimizer holds {len(held)} of adalora's {len(own)} tensors: one must hold all"
            )
        return bool(held)

    # -- masks ----------------------------------------------------------------------------------

    def _mask(self, scores: Tensor) -> None:
        """Keep the best triplets; the others' λ become 0."""
        costs = None
        if self.config.budget_unit == "params":
            each = zip(self._modules, self._unit_costs, strict=True)
            costs = [cost for module, cost in each for _ in range(module.adapter.r)]
        keep = best(scores, self.schedule.budget(self.step), costs)
        self._replica.values.index_fill_(0, self._places()[~keep.to(scores.device)], 0.0)
        self._set_kept(keep)
        self.masks[self.step] = self.ranks

    def _places(self) -> Tensor:
        """Where the λ of all triplets lie in the replica's values."""
        numels = [p.numel() for p in self._replica.named.values()]
        first = dict(zip(self._replica.named, [0, *accumulate(numels)], strict=False))
        starts = [first[f"{module.prefix}lora_E"] for module in self._modules]
        places = [
            torch.arange(start, start + module.adapter.r)
            for start, module in zip(starts, self._modules, strict=True)
        ]
        return torch.cat(places).to(self._replica.values.device)

    def _set_kept(self, keep: Tensor) -> None:
        on_device = keep.to(self._replica.values.device)
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
        self._scores = None

    # -- what is seen and kept ------------------------------------------------------------------

    @property
    def is_shrunk(self) -> bool:
        """Whether what was pruned is gone; nothing is scored any more then."""
        return self._scores is None

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
        """This rank's share of the scorer's averages, by parameter and name."""
        return self._scores.states() if self._scores else {}

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
        keep = torch.zeros(sum(m.adapter.r for m in self._modules), dtype=torch.bool)
        for module in self._modules:
            keep[module.place][record["kept"][module.path]] = True
        self._set_kept(keep)
        if record["shrunk"]:
            self._shrink(None)

    def load_averages(self, averages: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the averages, (`<parameter>.<name>`, whole tensor), of a checkpoint."""
        if self._scores:
            self._scores.load(averages)


def keep_triplets(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Give adapters that no replica owns the masks or shapes that a checkpoint records.

    Raises:
        UsageError: it records a triplet that its module never had.
    """
    for path, _, adapter in named_adapters(model):
        left = record["kept"].get(path)
        if left is None or not isinstance(adapter, AdaLoraAdapter):
            continue  # another run's: whoever compares the two says so
        if left and left[-1] >= adapter.r:
            raise UsageError(
                f"the checkpoint keeps triplet {left[-1]} of {path}, which has {adapter.r}"
            )
        if record["shrunk"]:
            adapter.shrink(torch.tensor(left, dtype=torch.int64))
        else:
            adapter.kept = torch.zeros(adapter.r, dtype=torch.bool)
            adapter.kept[left] = True


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
