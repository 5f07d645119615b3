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
    directions: ClassVar[int] = 0  # singular directions of the matrix that each unit of r needs
    options: ClassVar[type | None] = None  # a dataclass; its fields are `LoraConfig`'s as well

    @classmethod
    def options_from(cls, config: Any) -> dict[str, Any]:
        """The values in a `LoraConfig` of this initialisation's options."""
        own = fields(cls.options) if cls.options else ()
        return {f.name: getattr(config, f.name) for f in own}

    @classmethod
    def check(cls, r: int) -> str | None:
        """Why this initialisation is impossible at LoRA rank r; None if it is possible."""
        return None

    @classmethod
    def check_shape(cls, m: int, n: int, r: int) -> str | None:
        """Why a matrix [m, n] has no factors of LoRA rank r; None if it has."""
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
        """Fill A and B at random; where a matrix is needed, its factors replace them later.

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
        """Compute A and B from a matrix [m, n].

        Args:
            scaling: s of ΔW = s·B·A.
            settings: the values of the options.

        Returns:
            A [r, n] and B [m, r] in float64; None if its rank is too low: A and B stay as drawn.
        """
        raise NotImplementedError
