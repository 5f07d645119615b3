"""AdaLoRA on a replica: one budget of triplets over all matrices, and the same mask on every rank.

    before the reduction   the regulariser's gradient is added, so that the mean contains it once
    after optimizer.step   averages follow w and g ─> scores, one sum over ranks ─> mask ─> λ = 0
    after the last mask    A, B and E shrink to the triplets that are left

Gradients are global means by then, so every rank computes the same averages of its share of the
elements. The replica calls both: the first in `reduce_gradients`, the second after the step of
whatever optimizer has the adapters' parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlora.lora.adalora import orthogonality
from dlora.lora.adalora.budget import best
from dlora.lora.attach import attachment_of, named_adapters
from dlora.lora.method_state import MethodState, Tensors
from dlora.lora.variants.adalora import TRIPLET_DIM, AdaLoraAdapter, AdaLoraConfig
from dlora.methods import adalora_report
from dlora.methods.adalora_scores import Triplets, TripletScores
from dlora.sharding.replica.optimizer_state import ReplicaError
from dlora.sharding.replica.replica import Replica

SCORER = "scorer"  # the file of the averages in a checkpoint


class RankAllocator(MethodState):
    """Scores, masks and finally removes triplets, once per optimizer step.

    Args:
        model: attached with an `AdaLoraConfig`.
        replica: owns its adapters.

    Attributes:
        step: t, the number of optimizer steps made.
        schedule: of the budget, over all modules, in `budget_unit`.
        ranks: of each module, as the last mask left them.
        masks: {step: ranks} of every mask since this start of the run.
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
        self._left = [list(range(config.init_r)) for _ in self._modules]
        self.masks: dict[int, dict[str, int]] = {}
        self.orth_loss = torch.zeros(())
        self._reductions = 0

    # -- the two moments of a step --------------------------------------------------------------

    def before_reduce(self, tokens: int) -> None:
        """Add `tokens` times the gradient of γ·R to this rank's gradients.

        R is the same on every rank, so that the mean over all tokens of all ranks contains the
        gradient of γ·R exactly once.

        Raises:
            ReplicaError: gradients were reduced twice, and no optimizer made a step in between.
        """
        self._reductions += 1
        if self._reductions > 2 and self.step == 0:
            raise ReplicaError(
                "adalora: gradients were reduced twice without an optimizer step on the adapters; "
                "step them with a torch optimizer over replica.parameter_groups(...)"
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
                norms.append(orthogonality.add_gradient(factor, dim, gradient, each * tokens))
        self.orth_loss = each * torch.stack(norms).sum()

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, *, skipped: bool = False) -> None:
        """Score, mask and shrink, as scheduled for this step; a skipped step is not scored.

        Raises:
            ReplicaError: the optimizer has only some of the adapters' tensors, so that one step of
                all would count twice.
        """
        if not self._is_stepped_by(optimizer):
            return
        if self._scores is not None and not skipped and self.schedule.scores(self.step + 1):
            self._scores.follow()
        self.step += 1
        if self._scores is None:
            return
        if self.schedule.masks(self.step):
            self._mask(self._scores.all())
        if self.step == self.schedule.last:
            self._shrink(optimizer)

    def _is_stepped_by(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer has the adapters' tensors."""
        names = self._replica.optimized
        own = {id(names[m.prefix + name]) for m in self._modules for name in TRIPLET_DIM}
        held = own & {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held and held != own:
            raise ReplicaError(
                f"adalora: an optimizer has {len(held)} of the {len(own)} adapter tensors; give it "
                "all"
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
        """Indices of the λ of all triplets in the replica's values."""
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
            self._left[i] = keep[module.place].nonzero().view(-1).tolist()
            module.adapter.kept = on_device[module.place]

    def _shrink(self, optimizer: Optimizer | None) -> None:
        """Cut the pruned triplets out of parameters, the optimizer's state and the wire."""
        cuts = {
            module.prefix + name: cut
            for module, triplets in zip(self._modules, self._left, strict=True)
            for name, cut in module.adapter.cuts(torch.tensor(triplets, dtype=torch.int64)).items()
        }
        self._replica.resize(cuts, optimizer)
        for module in self._modules:
            module.adapter.shrunk()
        self._scores = None

    # -- metrics, checkpoints, files --------------------------------------------------------------

    @property
    def is_shrunk(self) -> bool:
        """Whether pruned triplets have been cut away; nothing is scored any more then."""
        return self._scores is None

    @property
    def resized_after(self) -> int | None:
        """The step of the last mask, once it has fallen."""
        return self.schedule.last if self.is_shrunk else None

    @property
    def ranks(self) -> dict[str, int]:
        """Triplets of each module that the last mask left."""
        return {m.path: len(left) for m, left in zip(self._modules, self._left, strict=True)}

    def metrics(self) -> dict[str, Any]:
        """γ·R, the scheduled budget, and the triplets (and parameters) that there are."""
        ranks = list(self.ranks.values())
        spent = sum(r * cost for r, cost in zip(ranks, self._unit_costs, strict=True))
        figures = {
            "orth_loss": float(self.orth_loss),
            "budget": self.schedule.budget(self.step),
            "kept_ranks": sum(ranks),
        }
        return figures | ({"kept_params": spent} if self.config.budget_unit == "params" else {})

    def progress(self) -> str:
        """The scheduled budget, and where it ends."""
        return f"budget {self.schedule.budget(self.step):,} -> {self.schedule.final:,}"

    def tensors(self) -> dict[str, Tensors]:
        """This rank's share of the scorer's averages."""
        return {SCORER: self._scores.states() if self._scores else {}}

    def record(self) -> dict[str, Any]:
        """The triplets that are left, of the init_r, and whether the others are cut away."""
        named = zip(self._modules, self._left, strict=True)
        return {"shrunk": self.is_shrunk, "kept": {module.path: left for module, left in named}}

    def load_record(self, step: int, record: Mapping[str, Any]) -> None:
        """Continue with the masks of a checkpoint, and with its shapes if it had shrunk.

        To be called before an optimizer has any state.
        """
        self.step = step
        keep = torch.zeros(sum(m.adapter.r for m in self._modules), dtype=torch.bool)
        for module in self._modules:
            keep[module.place][record["kept"][module.path]] = True
        self._set_kept(keep)
        if record["shrunk"]:
            self._shrink(None)

    def load_tensors(self, file: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        if file == SCORER and self._scores:
            self._scores.load(tensors)
        super().load_tensors(file, tensors)

    def write_files(self, directory: Path, until: int) -> None:
        """`ranks.json`: the masks up to a step, with those of earlier starts of the run."""
        own = {step: ranks for step, ranks in list(self.masks.items()) if step <= until}
        earlier = adalora_report.read_masks(directory, until=until)
        adalora_report.write_masks(directory, earlier | own)

    def report(self, directory: Path, log: Any, say: Callable[[str], None]) -> None:
        """The picture of the last mask, as a file and in the log."""
        figure = adalora_report.heat_map(self.ranks, self.config.init_r)
        log.figure("ranks", figure, self.step)
        say(f"ranks: {adalora_report.write_picture(directory, figure)}")
