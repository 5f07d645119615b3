"""LoRA: ΔW = s·B·A with A [r, n], B [m, r], s = α/r (rsLoRA: α/√r).

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; rsLoRA, https://arxiv.org/abs/2312.03732.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dlora.errors import UsageError
from dlora.lora import functional, functional_convolution
from dlora.lora.config import LoraConfig
from dlora.lora.dropout import DropoutStream, key_of
from dlora.lora.dropout_mask import Mask
from dlora.lora.given import Given, masked
from dlora.lora.init import Initialisation
from dlora.lora.method_state import MethodState, PlannedState
from dlora.lora.states import AdapterState, Stateful
from dlora.lora.step_values import StepValues
from dlora.quant.linear import Weight


class PlainLora(NamedTuple):
    """The plain form of any adapter: ΔW = scaling·B·A with A [r, n], B [m, r]; r may be 0."""

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def r(self) -> int:
        """Its LoRA rank."""
        return self.A.shape[0]


class LoraAdapter(Stateful):
    """A and B of one base module: a child whose `forward` is never called.

    Its layer calls `linear`, `embedding` or `convolution` instead. So no wrapper that hooks
    `forward` (FSDP2, ZeRO-3) sees it, and A and B stay whole plain tensors whatever the engine does
    with the base. Variants derive from it.

    Args:
        m, n: rows and columns of the layer's weight seen as [out, in]; for an embedding, the width
            of a row and the number of rows.
        path: the layer's path in the model; keys the dropout masks.
        offset: training does not start at B·A = 0, and what it starts at is subtracted.
        residual: as the attribute.
        dtype: of the masters A and B, float32 or float64.

    Attributes:
        needs_weight: `see_weight` is to be called before the first use.
        keeps_output: forward stores a tensor of the size of the output for backward.
        rescales_rows: it amounts to diag(d)·(W0 + ΔW), with d from `row_scale`.
        mergeable: it amounts to one ΔW for all tokens.
        linear_only: no embedding or convolution may have it; alone: none with a name may be of it.
        compiles: blocks with it may run as graphs of torch's compiler.
        prunes: the method may leave a module no rank, so that it has no part in the plain LoRA.
        state_class: what the method computes and saves beside A, B and the optimizer; one that
            needs all ranks is named `"module:class"`, since nothing here knows process groups.
        run_files: names of the files that the method writes into a run's directory.
        offset_A, offset_B: A₀ [r, n] and B₀ [m, r], frozen, whose product is subtracted; None where
            training starts at B·A = 0 anyway.
        residual: the layer's weight is W0 less s·B₀·A₀ already, as that of a packed base may be.
        state: what the layer computes with for now.
        given: what it computes with instead of its own, while a compiled graph runs.
    """

    settings: ClassVar[type[LoraConfig]] = LoraConfig
    name: ClassVar[str] = "lora"
    needs_weight: ClassVar[bool] = False
    keeps_output: ClassVar[bool] = False
    rescales_rows: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True
    linear_only: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    compiles: ClassVar[bool] = True
    prunes: ClassVar[bool] = False
    state_class: ClassVar[type[MethodState] | str] = MethodState
    run_files: ClassVar[tuple[str, ...]] = ()
    given: Given | None = None

    def __init__(
        self,
        *,
        m: int,
        n: int,
        r: int,
        scaling: float,
        dropout: float,
        path: str,
        stream: DropoutStream,
        values: StepValues,
        dtype: torch.dtype,
        device: torch.device,
        offset: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, n, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(m, r, dtype=dtype, device=device))
        self.scaling, self.dropout, self.path = scaling, dropout, path
        self.stream, self.values = stream, values
        self._key = key_of(path)
        self.residual = residual
        self.offset_A: Tensor | None
        self.offset_B: Tensor | None
        self.register_buffer("offset_A", torch.zeros_like(self.lora_A.data) if offset else None)
        self.register_buffer("offset_B", torch.zeros_like(self.lora_B.data) if offset else None)

    @property
    def r(self) -> int:
        """The LoRA rank."""
        return self.lora_A.shape[0]

    def singular_values(self) -> Tensor | None:
        """E [r, 1] that B is scaled with column by column; None for ones."""
        return None

    def offsets(self) -> dict[str, Tensor]:
        """A₀ and B₀ by their names; nothing where there are none."""
        found = {"offset_A": self.offset_A, "offset_B": self.offset_B}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A [k, n], B [m, k]) whose product is what this adapter adds, but for scale and E.

        They are the trained ones; beside an offset B₀·A₀ they are of rank 2r, in a form that is
        exactly zero at the start and cancels nothing afterwards:

            B·A − B₀·A₀ = [B − B₀ | B₀]·[A ; A − A₀]

        Where the layer's weight is the residual they are what it lacks: A and B, or A₀ and B₀ of
        an adapter that is switched off.
        """
        if not self.residual:
            return self.update_factors()
        if self.state is not AdapterState.OFF:
            return self.lora_A, self.lora_B
        assert self.offset_A is not None and self.offset_B is not None
        return self.offset_A, self.offset_B

    @property
    def active(self) -> bool:
        """Whether the layer computes with more than its weight."""
        if self.given is not None:
            return True
        if self.state is AdapterState.OFF:
            return self.residual
        return self.state in (AdapterState.ON, AdapterState.UNSTARTED)

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """The factors of ΔW, of what is added to W0."""
        A, B = self.lora_A, self.lora_B
        A0, B0 = self.offset_A, self.offset_B
        if A0 is None or B0 is None:
            return A, B
        return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)

    @torch.no_grad()
    def reset(self, *, is_embedding: bool, init: type[Initialisation]) -> None:
        """Start at ΔW = 0."""
        init.draw(self.lora_A, self.lora_B, is_embedding=is_embedding)

    @torch.no_grad()
    def start_from(self, A: Tensor, B: Tensor) -> None:
        """Start with these factors, [r, n] and [m, r], and subtract their product for good."""
        assert self.offset_A is not None and self.offset_B is not None
        for tensor in (self.lora_A, self.offset_A):
            tensor.copy_(A)
        for tensor in (self.lora_B, self.offset_B):
            tensor.copy_(B)

    def see_weight(self, weight: Tensor) -> None:
        """Read W0 [m, n], whole and unpacked, once, before the first use; do not store it."""

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """x [..., n], weight [m, n], packed or not → y [..., m]."""
        if (given := self.given) is not None:
            A, B, E, mask = given.A, given.B, given.E, given.mask_of(x)
            return functional.linear(x, weight, bias, A, B, self.scaling, E=E, mask=mask)
        A, B = self.factors()
        how: dict[str, Any] = {"E": self.singular_values(), "mask": self.mask(x)}
        return functional.linear(
            x, weight, bias, A, B, self.scaling, **how, shared=self.shared_by_passes
        )

    def linear_update(self, x: Tensor, weight: Weight) -> Tensor:
        """What `linear` adds to the product of the weight alone, [..., m]."""
        A, B = self.factors()
        E, mask = self.singular_values(), self.mask(x)
        return functional.low_rank(x, A, B, self.scaling, E=E, mask=mask)

    def give(self, x: Tensor, weight: Weight, r: int, layer: Tensor) -> Given:
        """What a compiled graph is given of this adapter, for a pass over x [rows, tokens, …].

        Args:
            weight: of its layer, [m, n].
            r: the rank that the graph has, at least that of `factors`.
            layer: int32 scalar, the key of this layer's dropout.
        """
        A, B = self.factors()
        E = self.singular_values()
        return Given.of(A, B, E, r, masked(self.mask(x), x, self._drops, self.dropout, layer))

    @property
    def _drops(self) -> bool:
        return self.training and self.state is not AdapterState.OFF and self.dropout > 0

    def embedding(self, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        """ids [...], weight [V, m] → y [..., m]. Dropout does not apply to a look-up (as PEFT)."""
        A, B = self.factors()
        E = self.singular_values()
        return functional.embedding(ids, weight, A, B, self.scaling, padding_idx, E=E)

    def convolution(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        convolve: functional_convolution.Convolve,
    ) -> Tensor:
        """x [..., c, *space], weight [m, c, *kernel] → y [..., m, *space]; n is c times the kernel.

        Args:
            convolve: (x, weight, bias) → y, with the layer's stride and padding.
        """
        A, B = self.factors()
        E, mask = self.singular_values(), self.mask(x, 1 - weight.ndim)
        return functional_convolution.convolution(
            x, weight, bias, A, B, self.scaling, convolve, E=E, mask=mask
        )

    def shared_by_passes(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A value of this adapter that is the same in all passes of a step."""
        return self.values.get(f"{self.path} {self.state.name} {name}", make)

    def mask(self, x: Tensor, dim: int = -1) -> Mask | None:
        """Dropout's mask over x with its columns along `dim`; None without dropout."""
        if not self._drops:
            return None
        return self.stream.mask(x.movedim(dim, -1), self.dropout, self._key)

    def as_lora(self) -> PlainLora:
        """The plain LoRA of the same ΔW; shares storage with this adapter where it can."""
        A, B = self.update_factors()
        return PlainLora(A.detach(), B.detach(), self.scaling)

    def delta(self) -> Tensor:
        """ΔW = s·B·A [m, n] in the masters' dtype."""
        A, B, scaling = self.as_lora()
        return (B @ A) * scaling

    def addend(self) -> Tensor:
        """What merging adds to the layer's weight, [m, n]: ΔW, or s·B·A beside a residual."""
        if not self.residual:
            return self.delta()
        return (self.lora_B.detach() @ self.lora_A.detach()) * self.scaling

    def row_scale(self, norms: Tensor) -> Tensor:
        """d [m], where `rescales_rows`, from the norms [m] of the rows of W0 + ΔW."""
        raise NotImplementedError

    # -- what a method with a state of its own overrides -----------------------------------------

    def planned_state(self, config: Any) -> PlannedState:
        """What the state of this adapter's method takes, for the plan.

        Args:
            config: the settings that it was attached with.
        """
        return PlannedState()

    @classmethod
    def check_record(cls, record: Any, names: Collection[str]) -> None:
        """Check what a checkpoint stores of the method as JSON, before anything is made of it.

        Args:
            record: None where the checkpoint has none.
            names: of the checkpoint's adapter tensors.

        Raises:
            UsageError: no run with this method writes that.
        """
        if record is not None:
            raise UsageError(
                f"method: {cls.settings.method} has no state, but the checkpoint records one"
            )

    def load_record(self, record: Any) -> None:
        """Resize the parameters, which no replica owns, as a checkpoint's record says."""

    def extra_repr(self) -> str:
        factor = self._parameters.get("lora_A")  # ZeRO-3 hides it while it partitions
        shown = "" if factor is None else f"r={factor.shape[0]}, "
        return f"{shown}scaling={self.scaling:g}, dropout={self.dropout:g}"
