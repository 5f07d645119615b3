"""MoLA: E LoRAs beside each adapted weight, of which a router picks k for every token.

    y = W0 x + Σ_{e∈𝒦} g_e·s_e·B_e A_e x        𝒦 the k largest of ℓ = R x, g = softmax of ℓ over 𝒦

`lora_A` [K, n] has the A_e of all experts one below the other, `lora_B` [m, K] the B_e side by
side, K = Σ r_e, and `lora_router` is R [E, n]. Every adapted linear layer has a router of its own,
which reads what the layer reads. See `functional_experts` for the arithmetic, `balance` for the
loss that keeps experts in use, and `dlora.methods.mola` for how it is made global.

Source: Li et al. 2024 (MixLoRA), https://arxiv.org/abs/2404.15159: router, top-k, balance loss and
their numbers; Zadouri et al. 2023 (MoLoRA), https://arxiv.org/abs/2309.05444: LoRAs as experts of
single layers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dlora.errors import UsageError
from dlora.lora import functional_experts
from dlora.lora.balance import BalanceSums, pairs_of
from dlora.lora.config import LoraConfig
from dlora.lora.dropout import seed_of
from dlora.lora.functional_experts import Experts
from dlora.lora.init import Initialisation
from dlora.lora.method_state import PlannedState
from dlora.lora.variants.lora import LoraAdapter, PlainLora
from dlora.quant.linear import Weight
from dlora.registry import option

# What an expert's files say of its sizes; the rest is the same for all experts.
SIZES = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class MolaConfig(LoraConfig):
    """Settings of a mixture of LoRA experts; `r`, `lora_alpha` and patterns are of each expert.

    Args:
        experts: E, at least `top_k`.
        top_k: k, experts for each token.
        balance_coef: c of the loss c·mean over routers of E·Σ_e f_e P_e, see `dlora.lora.balance`.
        router_init_std: σ of R ~ N(0, σ²).
        experts_from: directories of plain LoRAs, which become the experts in this order and stay
            frozen, so that routers alone are trained; empty: E fresh ones are trained as well.
        expert_settings: r, lora_alpha, use_rslora and patterns of each expert, where they differ
            or come from files; `dlora.adapters.mixture` fills it in.

    Raises:
        UsageError: a value is out of range, or is none of a mixture.
    """

    method: ClassVar[str] = "mola"

    experts: int = option(8, "LoRA experts of each adapted layer", ge=1, le=1024)
    top_k: int = option(2, "experts that a token uses", ge=1)
    balance_coef: float = option(
        1e-3, "weight of the loss that keeps all experts in use; 0: none", ge=0
    )
    router_init_std: float = option(0.02, "standard deviation of fresh routers", ge=0)
    experts_from: list[str] = option(
        [], "plain LoRAs that become the experts, frozen: only routers are trained"
    )
    expert_settings: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        named = len(self.experts_from)
        if named and self.experts not in (named, type(self).experts):
            raise UsageError(f"experts: {self.experts}, but experts_from names {named}")
        if named:
            object.__setattr__(self, "experts", named)
        super().__post_init__()
        if self.top_k > self.experts:
            raise UsageError(f"top_k: {self.top_k} is more than the {self.experts} experts")
        for name in ("modules_to_save", "target_parameters"):
            if getattr(self, name):
                raise UsageError(f"{name}: mola's experts are plain LoRAs of linear layers alone")
        if self.expert_settings and len(self.expert_settings) != self.experts:
            raise UsageError(
                f"expert_settings: {len(self.expert_settings)} for {self.experts} experts"
            )
        each = self.expert_settings or [{}] * self.experts
        usual = {name: getattr(self, name) for name in SIZES}
        sizes = [LoraConfig(**{**usual, **own}) for own in each]
        object.__setattr__(self, "_sizes", sizes)

    @property
    def frozen(self) -> bool:
        """Whether routers alone are trained."""
        return bool(self.experts_from)

    def experts_at(self, path: str) -> Experts:
        """Ranks and scales of the experts of the module at `path`."""
        sizes: list[LoraConfig] = self._sizes  # type: ignore[attr-defined]
        ranks = tuple(own.r_for(path) for own in sizes)
        return Experts(ranks, tuple(own.scaling_for(path) for own in sizes), self.top_k)

    def shapes_for(self, path: str, kernel: tuple[int, ...]) -> dict[str, Any]:
        return {
            "experts": self.experts_at(path),
            "router_init_std": self.router_init_std,
            "frozen": self.frozen,
        }


class MolaAdapter(LoraAdapter):
    """The experts and the router of one linear layer.

    Args:
        experts: their sizes; `r` and `scaling` are ignored.
        router_init_std: σ.
        frozen: A and B are buffers, to be filled from files, and only the router is a parameter.

    Attributes:
        experts: as given.
        sums: what backward passes add to for the balance loss; None where nobody makes one of them.
        filled: whether frozen experts have been read.
        mean_gates: [E] mean of g over tokens, lately in training; None: not measured.
    """

    settings = MolaConfig
    name = "mola"
    mergeable = False
    linear_only = True
    alone = True
    compiles = False
    state_class = "dlora.methods.mola:ExpertBalance"
    unused = {
        "init_lora_weights": "mola starts every expert at random, with B = 0",
        "modules_to_save": "mola's experts are plain LoRAs of linear layers alone",
        "target_parameters": "mola's experts are plain LoRAs of linear layers alone",
    }
    clashes = (
        ("train.task", "!=", "causal", "which trains no head and one sequence of tokens"),
        ("train.compile", "==", True, "whose routers are not in graphs"),
    )

    def __init__(
        self,
        *,
        n: int,
        r: int,
        scaling: float,
        experts: Experts,
        router_init_std: float,
        frozen: bool,
        dtype: torch.dtype,
        device: torch.device,
        **others: Any,
    ) -> None:
        K = sum(experts.ranks)
        scaling = experts.scalings[0]
        super().__init__(n=n, r=K, scaling=scaling, dtype=dtype, device=device, **others)
        if frozen:
            for name in ("lora_A", "lora_B"):
                tensor = self.get_parameter(name).data.zero_()
                delattr(self, name)
                self.register_buffer(name, tensor)
        count = len(experts.ranks)
        self.lora_router = nn.Parameter(torch.empty(count, n, dtype=dtype, device=device))
        self.experts, self.router_init_std, self.frozen = experts, router_init_std, frozen
        self.sums: BalanceSums | None = None
        self.filled = False
        self.mean_gates: Tensor | None = None

    def offsets(self) -> dict[str, Tensor]:
        """A and B of frozen experts."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B} if self.frozen else {}

    @torch.no_grad()
    def reset(self, *, is_embedding: bool, init: type[Initialisation]) -> None:
        """Start at ΔW = 0 with another A for each expert: equal ones would stay equal.

        The router has a generator of its own, so that A is drawn as that of a LoRA.
        """
        for A, B in () if self.frozen else self.of_each():
            init.draw(A, B, is_embedding=False)
        seeded = torch.Generator().manual_seed(seed_of("router", torch.initial_seed(), self.path))
        drawn = torch.randn(self.lora_router.shape, generator=seeded, dtype=self.lora_router.dtype)
        self.lora_router.copy_(drawn * self.router_init_std)

    def of_each(self) -> list[tuple[Tensor, Tensor]]:
        """(A_e [r_e, n], B_e [m, r_e]) of every expert, views without gradients."""
        ranks = self.experts.ranks
        pairs = self.lora_A.detach().split(ranks), self.lora_B.detach().split(ranks, dim=1)
        return list(zip(*pairs, strict=True))

    def balance(self, coefficient: float) -> BalanceSums:
        """Let backward passes in training mode sum what the balance loss needs."""
        R = self.lora_router
        trains = coefficient > 0
        self.sums = BalanceSums(*R.shape, trains=trains, dtype=R.dtype, device=R.device)
        return self.sums

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        sums = self.sums if self.training and torch.is_grad_enabled() else None
        return functional_experts.linear(
            x,
            weight,
            bias,
            self.lora_A,
            self.lora_B,
            self.lora_router,
            self.experts,
            mask=self.mask(x),
            shared=self.shared_by_passes,
            sums=sums,
            counted=None if sums is None else self.stream.counted(x),
        )

    def linear_update(self, x: Tensor, weight: Weight) -> Tensor:
        A, B, R = self.lora_A, self.lora_B, self.lora_router
        return functional_experts.update(x, A, B, R, self.experts, mask=self.mask(x))

    def as_lora(self) -> PlainLora:
        """Not this adapter: every expert for all tokens, by its mean gate.

        Raises:
            UsageError: the mean gates are not known.
        """
        if self.mean_gates is None:
            raise UsageError(f"mola: the mean gates of {self.path} were not measured in training")
        gates_1E = self.mean_gates.to(self.lora_B)[None]
        gates_1K = self.experts.spread(self.experts.weighted(gates_1E), self.lora_B.dtype)
        return PlainLora(self.lora_A.detach(), self.lora_B.detach() * gates_1K, self.scaling)

    def planned_state(self, config: Any) -> PlannedState:
        """The sums of the balance loss, which go over ranks once a step."""
        count, n = self.lora_router.shape
        pairs = pairs_of(count) * n if config.balance_coef > 0 else 0
        return PlannedState(summed_always=3 * count + 1, working=3 * count + pairs)

    @classmethod
    def check_record(cls, record: Any, names: Collection[str]) -> None:
        gates = record.get("gates") if isinstance(record, dict) else None
        lists = gates.values() if isinstance(gates, dict) else [None]
        if not all(
            isinstance(each, list) and all(type(g) is float for g in each) for each in lists
        ):
            raise UsageError("method: does not list the mean gates of experts by module")

    def load_record(self, record: Any) -> None:
        """Take over the mean gates of a checkpoint."""
        gates = record["gates"].get(self.path)
        if gates is not None:
            self.mean_gates = torch.tensor(gates, dtype=self.lora_router.dtype)
