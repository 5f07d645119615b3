"""AdaLoRA: ΔW = s·P·diag(λ)·Q, triplets (P_i, λ_i, Q_i) of which the less important are pruned.

P [m, r₀] is `lora_B`, λ [r₀, 1] is `lora_E`, Q [r₀, n] is `lora_A`, as in PEFT. The scale s = α/r₀
is that of the initial rank and stays the same through all pruning. What is pruned, and when, is
decided over all matrices together: see `dlora.lora.adalora` (`budget`, `importance`).

Source: Zhang et al. 2023, https://arxiv.org/abs/2303.10512.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dlora.errors import UsageError
from dlora.lora.adalora.budget import BudgetSchedule
from dlora.lora.adalora.importance import IMPORTANCES
from dlora.lora.config import LoraConfig
from dlora.lora.init import Initialisation
from dlora.lora.layers import CHILD
from dlora.lora.method_state import PlannedState
from dlora.lora.states import AdapterState
from dlora.lora.variants.lora import LoraAdapter, PlainLora
from dlora.registry import option

TRIPLET_DIM = {"lora_A": 0, "lora_B": 1, "lora_E": 0}  # the dim that counts triplets


@dataclass(frozen=True)
class AdaLoraConfig(LoraConfig):
    """Settings of AdaLoRA; names and meanings are PEFT's. `r` is ignored: it is `init_r`.

    Args:
        init_r: rank r₀ of every module at the start.
        target_r: mean rank at the end, at most `init_r`.
        total_step: T, optimizer steps of the whole run. `dlora.train` fills it in.
        tinit: steps before the first pruning.
        tfinal: steps at the end in which what is left is trained on, without pruning.
        deltaT: steps between two prunings.
        beta1, beta2: decay of the averages of sensitivity and uncertainty, in [0, 1).
        orth_reg_weight: γ of the regulariser γ·mean over all P and Q of ‖PᵀP − I‖_F, ‖QQᵀ − I‖_F.
        importance: `"uncertainty"` (sensitivity times uncertainty, both averaged: the paper's),
            `"sensitivity"` (of the step alone) or `"magnitude"` (|λ|).
        budget_unit: `"triplets"`, or `"params"`: a triplet costs its m + n + 1 parameters.

    Raises:
        UsageError: a value is out of range, or the phases do not fit `total_step`.
    """

    method: ClassVar[str] = "adalora"

    init_r: int = option(12, "rank at the start", ge=1)
    target_r: int = option(8, "mean rank at the end", ge=1)
    total_step: int | None = None
    tinit: int = option(0, "steps before the first pruning", ge=0)
    tfinal: int = option(0, "steps after the last pruning", ge=0)
    deltaT: int = option(1, "steps between two prunings", ge=1)  # noqa: N815 - PEFT's name
    beta1: float = option(
        0.85, "smoothing of the sensitivity", ge=0, lt=1, when={"importance": "uncertainty"}
    )
    beta2: float = option(
        0.85, "smoothing of the uncertainty", ge=0, lt=1, when={"importance": "uncertainty"}
    )
    orth_reg_weight: float = option(0.5, "weight of the orthogonality penalty", ge=0)
    importance: Literal["uncertainty", "sensitivity", "magnitude"] = option(
        "uncertainty",
        "what scores a triplet: averages of sensitivity and uncertainty, sensitivity in the mask's "
        "step, or |lambda|",
    )
    budget_unit: Literal["triplets", "params"] = option(
        "triplets", "what the budget counts; params: a triplet of a large matrix costs more"
    )

    def __post_init__(self) -> None:
        if self.rank_pattern:
            raise UsageError("rank_pattern: adalora starts every module with rank init_r")
        object.__setattr__(self, "r", 1)  # so that a wrong init_r is reported under its own name
        super().__post_init__()
        object.__setattr__(self, "r", self.init_r)
        if self.target_r > self.init_r:
            raise UsageError(
                f"target_r: {self.target_r} is more than the rank at the start, init_r "
                f"{self.init_r}"
            )
        if self.total_step is not None:
            _check_whole("total_step", self.total_step, 1)
            self.schedule(1, 1)

    def for_steps(self, total_steps: int) -> AdaLoraConfig:
        """These settings with T = `total_steps`, the steps of the schedule."""
        return replace(self, total_step=total_steps)

    def schedule(self, initial: int, final: int) -> BudgetSchedule:
        """The schedule from budget `initial` to `final`; a `UsageError` without `total_step`."""
        if self.total_step is None:
            raise UsageError("total_step: adalora needs the number of optimizer steps of the run")
        return BudgetSchedule(initial, final, self.total_step, self.tinit, self.tfinal, self.deltaT)


class AdaLoraAdapter(LoraAdapter):
    """P, λ and Q of one base module.

    Attributes:
        final: whether the parameters have been cut after the last mask; nothing is scored then.
        kept: [r] bool, the triplets that the last mask left; None before the first one. In training
            a pruned λ may grow again until the next mask; in eval mode it counts as 0, so that what
            is evaluated, merged and saved is the pruned model.
    """

    settings = AdaLoraConfig
    name = "adalora"
    prunes = True
    state_class = "dlora.methods.adalora:RankAllocator"
    run_files = ("ranks.json", "ranks.png")
    unused = {
        "rank_pattern": "adalora starts every module with rank adapter.init_r",
        "init_lora_weights": "adalora starts every module with lambda = 0",
    }
    instead = {"r": "init_r"}

    def __init__(self, *, r: int, dtype: torch.dtype, device: torch.device, **others: Any) -> None:
        super().__init__(r=r, dtype=dtype, device=device, **others)
        self.lora_E = nn.Parameter(torch.empty(r, 1, dtype=dtype, device=device))
        self.kept: Tensor | None = None
        self.final = False

    @torch.no_grad()
    def reset(self, *, is_embedding: bool, init: type[Initialisation]) -> None:
        """Start at ΔW = 0: λ = 0, and P, Q ~ N(0, 0.02²)."""
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        self.lora_E.zero_()

    def singular_values(self) -> Tensor:
        """λ [r, 1]; in eval mode 0 for pruned triplets."""
        return self.lora_E if self.training else self._pruned()

    def as_lora(self) -> PlainLora:
        """A = (λQ) and B = P of the triplets that are not pruned and whose λ is not 0."""
        values = self._pruned().detach()
        there = values.view(-1).nonzero().view(-1)
        A = (self.lora_A.detach() * values)[there]
        return PlainLora(A, self.lora_B.detach()[:, there], self.scaling)

    def triplets(self) -> Tensor:
        """Indices of the triplets that the last mask left."""
        if self.kept is None:
            return torch.arange(self.r)
        return self.kept.nonzero().view(-1)

    def shrink(self, triplets: Tensor) -> None:
        """Cut the parameters to the triplets at these indices; only where no replica owns them."""
        for name, (dim, indices) in self.cuts(triplets).items():
            parameter = self.get_parameter(name)
            parameter.data = parameter.data.index_select(dim, indices)
        self.shrunk()

    def cuts(self, triplets: Tensor) -> dict[str, tuple[int, Tensor]]:
        """(dim, indices that stay) of each parameter, by its name here."""
        indices = triplets.to(self.lora_E.device)
        return {name: (dim, indices) for name, dim in TRIPLET_DIM.items()}

    def shrunk(self) -> None:
        """Note that the parameters have been cut; with no triplet left there is no adapter."""
        self.kept, self.final = None, True
        if self.r == 0:
            self.become(AdapterState.EMPTY)

    def planned_state(self, config: AdaLoraConfig) -> PlannedState:
        """The averages of each element, until the last mask, and one score for each triplet."""
        averages = 0 if self.final else len(IMPORTANCES[config.importance])
        return PlannedState(dict.fromkeys(TRIPLET_DIM, averages), summed=self.r)

    @classmethod
    def check_record(cls, record: Any, names: Collection[str]) -> None:
        lists = record.get("kept") if isinstance(record, dict) else None
        if (
            not isinstance(lists, dict)
            or not isinstance(record.get("shrunk"), bool)
            or not all(isinstance(left, list) and _ascends(left) for left in lists.values())
        ):
            raise UsageError("method: does not list triplets by module")
        ends = f".{CHILD}.lora_E"
        if {f"{path}{ends}" for path in lists} != {name for name in names if name.endswith(ends)}:
            raise UsageError("method: its triplets differ from those of adapter.safetensors")

    def load_record(self, record: Any) -> None:
        """Mask the triplets that a checkpoint had pruned, or cut them where it had.

        Raises:
            UsageError: it has a triplet that this module does not have.
        """
        left = record["kept"].get(self.path)
        if left is None:
            return  # another run's record: `check_resume` names what differs
        if left and left[-1] >= self.r:
            raise UsageError(
                f"the checkpoint has triplet {left[-1]} of {self.path}, but init_r is {self.r}"
            )
        if record["shrunk"]:
            self.shrink(torch.tensor(left, dtype=torch.int64))
        else:
            self.kept = torch.zeros(self.r, dtype=torch.bool)
            self.kept[left] = True

    def _pruned(self) -> Tensor:
        if self.kept is None:
            return self.lora_E
        return self.lora_E.masked_fill(~self.kept.to(self.lora_E.device).unsqueeze(1), 0.0)


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name}: must be a whole number of at least {least}, not {value!r}")


def _ascends(numbers: list[Any]) -> bool:
    """Whether they are whole numbers from 0 on, each once and in order."""
    return all(type(n) is int and n >= 0 for n in numbers) and numbers == sorted({*numbers})
