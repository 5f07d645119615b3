"""What an initialisation of A and B is."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

Needs = Literal["nothing", "weight", "gradient"]


class Initialisation:
    """How A [r, n] and B [m, r] start.

    One that needs nothing draws them so that B·A = 0. One that needs a matrix [m, n], W0 or the
    gradient of W0, makes them of it: their product at the start is a frozen offset that the adapter
    subtracts again, so that W0 stays what it is and training starts at ΔW = 0.
    """

    name: ClassVar[str | bool]
    needs: ClassVar[Needs] = "nothing"
    directions: ClassVar[int] = 0  # singular ones of the matrix, for each of the LoRA rank
    options: ClassVar[type | None] = None  # a dataclass; its fields are `LoraConfig`'s as well

    @classmethod
    def options_from(cls, config: Any) -> dict[str, Any]:
        """What a `LoraConfig` sets of its options."""
        own = fields(cls.options) if cls.options else ()
        return {f.name: getattr(config, f.name) for f in own}

    @classmethod
    def check(cls, r: int) -> str | None:
        """Why a module cannot start so at this rank; None where it can."""
        return None

    @classmethod
    def check_shape(cls, m: int, n: int, r: int) -> str | None:
        """Why a matrix [m, n] has no start of this LoRA rank to give; None where it has one."""
        wanted, there = cls.directions * r, min(m, n)
        if wanted <= there:
            return None
        return (
            f"a LoRA rank of {r} needs {wanted} singular directions with {cls.name}, but a matrix "
            f"of {m} x {n} has {there}"
        )

    @classmethod
    @torch.no_grad()
    def draw(cls, A: Tensor, B: Tensor, *, is_embedding: bool) -> None:
        """Fill A and B at random; for those that need a matrix, until that is at hand.

        Linear: A ~ U(−1/√n, 1/√n), B = 0. Embedding: A = 0, B ~ N(0, 1).
        """
        if is_embedding:
            A.zero_()
            B.normal_()
        else:
            nn.init.kaiming_uniform_(A, a=5**0.5)
            B.zero_()

    @classmethod
    def factors(
        cls, matrix: Tensor, r: int, scaling: float, **settings: float
    ) -> tuple[Tensor, Tensor] | None:
        """(A [r, n], B [m, r]) in float64 for a matrix [m, n]; None where it has none to give, and
        the layer stays as it was drawn.

        Args:
            scaling: s of ΔW = s·B·A.
            settings: its options.
        """
        raise NotImplementedError
