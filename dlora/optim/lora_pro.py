"""LoRA-Pro: an optimizer that steps A and B of a pair so that W moves as in full fine-tuning.

`dlora/lora/lora_pro.py` defines h_A, h_B and g̃, and computes them from g_A and g_B. Adam's
moments are in one of two places:

    low    g_A, g_B ──closed form──> h_A, h_B ──AdamW, moments [r, n] and [m, r]──> A, B
    full   g_A, g_B ──X = 0──> g̃ ──Adam, moments [m, n]──> u ──s·Bᵀu, s·u·Aᵀ, closed form──> A, B

`full` is the paper's: W follows full fine-tuning with Adam as closely as A and B allow, and lr is a
rate for full fine-tuning (2e-5, say). It stores two tensors of the size of every adapted weight.
`low` stores what AdamW stores, and its lr is LoRA's. The closed form has to precede Adam, which
removes the scale of B from g_A: (BᵀB)⁻¹ after it would divide by a scale that is gone.

Order of a step: gradients are averaged, then clipped as they are, then adjusted. `low` and `full`
decay A and B towards zero as AdamW does (decoupled, at lr). Parameters in no pair (magnitudes,
trained copies of `modules_to_save`) get AdamW.

Source: Wang et al. 2025, https://arxiv.org/abs/2407.18242. Unlike its code this reads the scale s
of every pair, takes the limit at B = 0, and counts steps from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlora.errors import UsageError
from dlora.lora.lora_pro import Frame, Gram, equivalent, grams, seen
from dlora.optim.rule import Groups
from dlora.registry import option
from dlora.sharding.replica.owned_state import StepUnit

MOMENTS = ("low", "full")


@dataclass(frozen=True)
class LoraProOptions:
    """Where the moments are."""

    lora_pro_moments: Literal["low", "full"] = option(
        "low",
        "low: moments of the sizes of A and B; full: of W, with the paper's lr",
    )


class LoraProRule:
    """The rule `lora_pro`."""

    name = "lora_pro"
    moments = 2
    divides = "pairs"
    unused = {
        "loraplus_lr_ratio": "lora_pro's updates of A and B are one update of W, at one rate",
    }
    clashes = (  # type: ignore[var-annotated]
        ("adapter.method", "!=", "lora", "which steps only pairs of A and B"),
        ("adapter.target_parameters", "!=", [], "which steps only pairs of one A and one B"),
    )

    @staticmethod
    def build(groups: Groups, pairs: Sequence[Any], section: Any, *_: Any) -> Optimizer:
        """`LoraPro`, with the moments where the section puts them."""
        return LoraPro(groups, pairs, moments=section.lora_pro_moments)


class Pair(NamedTuple):
    """ΔW = scaling·B·A, with A [r, n] and B [m, r], also of a convolution, flattened."""

    A: nn.Parameter
    B: nn.Parameter
    scaling: float

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(m, n, r)."""
        return self.B.shape[0], self.A[0].numel(), self.A.shape[0]


def pair_cost(m: int, n: int, r: int, moments: str) -> float:
    """Multiplications of a step of a pair, up to a factor, by which pairs are given to ranks."""
    return float(m * n * r if moments == "full" else (m + n + r) * r * r)


class LoraPro(Optimizer):
    """AdamW on pairs, adjusted as LoRA-Pro does.

    Args:
        params: as of `torch.optim.AdamW`: parameters or groups, as `replica.parameter_groups(lr)`.
        pairs: (A, B, scale) of every adapter, as `replica.pairs`; A and B are among `params`.
        lr: default of groups without one; `betas`, `eps` and `weight_decay` likewise.
        moments: `"low"` or `"full"`, see above.

    `replica.attach_optimizer(optimizer)` distributes the pairs over ranks: one rank steps each and
    alone stores its moments, and steps are collective from then on. Without it each rank steps all.

    Raises:
        UsageError: `moments` is neither, A and B of a pair have different rates, or they are not
            among `params`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        pairs: Iterable[tuple[nn.Parameter, nn.Parameter, float]],
        *,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        moments: str = "low",
    ) -> None:
        if moments not in MOMENTS:
            raise UsageError(f"moments: expected one of {', '.join(MOMENTS)}, got {moments!r}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.pairs, self.moments = [Pair(*pair) for pair in pairs], moments
        self._mine: Sequence[int] = range(len(self.pairs))
        self._check_pairs()

    # -- owned by ranks (`dlora.sharding.replica.owned_state.InUnits`) ---------------------------

    @property
    def units(self) -> list[StepUnit]:
        """The pairs with their costs."""
        return [StepUnit((p.A, p.B), pair_cost(*p.sizes, self.moments)) for p in self.pairs]

    def step_only(self, indices: Collection[int]) -> None:
        """Step these pairs from now on, and no other; the state of the others is deleted."""
        self._mine = sorted(indices)
        for index in set(range(len(self.pairs))).difference(self._mine):
            for factor in self.pairs[index][:2]:
                self.state.pop(factor, None)

    @property
    def moment_shapes(self) -> dict[nn.Parameter, torch.Size]:
        """Shapes of the moments that are stored under a parameter of a pair."""
        shapes = {}
        for pair in self.pairs:
            m, n, r = pair.sizes
            shapes[pair.A] = torch.Size((m if self.moments == "full" else r, n))
            shapes[pair.B] = torch.Size((m, r))
        return shapes

    # -- a step ---------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every pair that this rank steps, and of every tensor that is in no pair."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [p for p in (self.pairs[i] for i in self._mine) if _has_gradient(p)]
        factors = [f for p in pairs for f in (_matrix(p.A), _matrix(p.B).t())]
        found = grams(factors) if factors else []
        groups = self._groups()
        for pair, of_A, of_B in zip(pairs, found[::2], found[1::2], strict=True):
            self._step_pair(pair, of_A, of_B, groups[id(pair.A)])
        paired = {id(factor) for pair in self.pairs for factor in pair[:2]}
        for group in self.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in paired and parameter.grad is not None:
                    update = self._direction(parameter, parameter.grad, group)
                    _move(parameter, update, group)
        return loss

    def _step_pair(self, pair: Pair, of_A: Gram, of_B: Gram, group: dict[str, Any]) -> None:
        A, B = _matrix(pair.A), _matrix(pair.B)
        frame = Frame(A, B, pair.scaling, of_A, of_B)
        g_A, g_B = _gradient(pair.A), _gradient(pair.B)
        if self.moments == "full":
            h_A, h_B = (h.to(A.dtype) for h in frame.nearest(g_A, g_B))
            gradient = equivalent(A, B, h_A, h_B, pair.scaling)
            g_A, g_B = seen(A, B, self._direction(pair.A, gradient, group), pair.scaling)
        h_A, h_B = (h.to(A.dtype) for h in frame.balanced(g_A, g_B))
        if self.moments == "low":
            h_A = self._direction(pair.A, h_A, group)
            h_B = self._direction(pair.B, h_B, group)
        _move(pair.A, h_A, group)
        _move(pair.B, h_B, group)

    def _direction(self, key: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Adam's m̂ / (√v̂ + ε), of moments that are stored under `key`."""
        state, (beta1, beta2) = self.state[key], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        state["step"] += 1
        step = int(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        return torch.div(state["exp_avg"], root, out=root).div_(1 - beta1**step)

    # -- checks of arguments --------------------------------------------------------------------

    def _groups(self) -> dict[int, dict[str, Any]]:
        return {id(p): group for group in self.param_groups for p in group["params"]}

    def _check_pairs(self) -> None:
        groups = self._groups()
        for pair in self.pairs:
            m, n, r = pair.sizes
            shapes = f"A {list(pair.A.shape)} and B {list(pair.B.shape)}"
            if {id(pair.A), id(pair.B)} - groups.keys():
                raise UsageError(
                    f"LoraPro: {shapes} are not among its parameters; it needs whole tensors: "
                    'shard(..., optimizer_state="replicated"); replica.attach_optimizer(optimizer) '
                    "distributes the pairs over ranks"
                )
            if pair.B.numel() != m * r:
                raise UsageError(f"LoraPro: {shapes} are not a pair [r, n] and [m, r]")
            rates = groups[id(pair.A)]["lr"], groups[id(pair.B)]["lr"]
            if rates[0] != rates[1]:
                raise UsageError(
                    f"LoraPro: {shapes} have the learning rates {rates[0]:g} and {rates[1]:g}, but "
                    "need the same one (loraplus_lr_ratio: 1)"
                )


def _has_gradient(pair: Pair) -> bool:
    return pair.A.grad is not None or pair.B.grad is not None


def _matrix(factor: Tensor) -> Tensor:
    return factor.detach().flatten(1)


def _gradient(factor: Tensor) -> Tensor:
    return _matrix(factor.grad if factor.grad is not None else torch.zeros_like(factor))


def _move(parameter: Tensor, update: Tensor, group: dict[str, Any]) -> None:
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(update.view_as(parameter), alpha=-group["lr"])
