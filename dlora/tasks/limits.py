"""What a model can take: tokens with an embedding, and positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dlora.errors import UsageError
from dlora.tasks.generation import learned_positions


@dataclass(frozen=True)
class Limits:
    """What a model can take.

    Attributes:
        rows: of its embedding.
        positions: that it has learned; None: any.
        whose: it, in words.
    """

    tokenizer: Any
    rows: int
    positions: int | None
    whose: str = "the model"

    def beside(self, other: Limits) -> Limits:
        """The tighter of two models, where the other one takes fewer tokens or positions."""
        limit = [n for n in (self.positions, other.positions) if n is not None]
        tighter = other.rows < self.rows or (limit and min(limit) != self.positions)
        whose = other.whose if tighter else self.whose
        rows = min(self.rows, other.rows)
        return Limits(self.tokenizer, rows, min(limit, default=None), whose)

    def check(self, key: str, largest_id: int, longest: int) -> None:
        """Check that the model has an embedding for every token, and learned every position.

        Args:
            key: of the data set, whose largest token and most tokens of a sequence these are.
        """
        if largest_id >= self.rows:
            token = self.tokenizer.convert_ids_to_tokens(largest_id)
            raise UsageError(
                f"{key}: contains the token {largest_id} ({token!r}), but {self.whose}'s embedding "
                f"has {self.rows} rows; its tokenizer knows tokens that model.path does not"
            )
        if self.positions is not None and longest > self.positions:
            raise UsageError(
                f"data.max_length: {key} contains a sequence of {longest} tokens, but {self.whose} "
                f"has learned {self.positions} positions; set data.max_length to {self.positions} "
                "or less"
            )


def limits_of(tokenizer: Any, model: Any, whose: str = "the model") -> Limits:
    """The limits of a model; it may be on the meta device."""
    return Limits(tokenizer, embedding_rows(model), learned_positions(model), whose)


def pad_token(tokenizer: Any, model: Any) -> int:
    """The token of padded positions: any that has an embedding, since they have no target."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(t for t in candidates if t is not None and t < embedding_rows(model))


def embedding_rows(model: Any) -> int:
    """Tokens that the model has an embedding for."""
    return model.get_input_embeddings().num_embeddings
