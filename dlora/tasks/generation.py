"""Greedy answers of a model that generates, for a look at it between steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dlora.data.encode import NO_TARGET, Example
from dlora.data.stops import stop_tokens, until_stop
from dlora.objectives.own_length import depends_on_length, forget_lengths

MOST_NEW_TOKENS = 24


def generated(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    prompts: list[list[int]],
    *,
    pad_id: int,
    ends: Sequence[int] = (),
) -> list[tuple[str, str, str]]:
    """(prompt, wanted answer, answer) of each example.

    Collective on a sharded base: every rank generates the same tokens, so that gathers match. The
    model is in eval mode, without gradients.

    Args:
        prompts: the tokens that the model gets of each.
        ends: tokens that end the answers of the data, where an answer then ends as well.
    """
    most = MOST_NEW_TOKENS
    if not is_writer(model) and (positions := learned_positions(model)) is not None:
        most = min(most, positions - max(map(len, prompts)))
    stops = stop_tokens(tokenizer, model.generation_config.eos_token_id, ends)

    def plain(tokens: list[int]) -> str:
        return tokenizer.decode(until_stop(tokens, stops), skip_special_tokens=True).strip()

    # A state, or positions that depend on the length, would take padding for a part of the prompt.
    alone = getattr(model, "_is_stateful", False) or depends_on_length(model)
    answers = [
        answer
        for group in ([[prompt] for prompt in prompts] if alone else [prompts])
        for answer in generated_tokens(model, group, pad_id, stops, most)
    ]
    return [
        (
            tokenizer.decode(prompt, skip_special_tokens=True).strip(),
            plain([t for t in example.labels.tolist() if t != NO_TARGET]),
            plain(answer),
        )
        for prompt, example, answer in zip(prompts, examples, answers, strict=True)
    ]


def generated_tokens(
    model: Any,
    prompts: list[list[int]],
    pad_id: int,
    stops: list[int],
    max_new_tokens: int,
    *,
    together: bool = False,
    stopping: Callable[[int], Any] | None = None,
) -> list[list[int]]:
    """What the model says to prompts, each up to `stops`.

    They are padded to one length: a decoder's on the left, where it goes on at the right end, and
    an encoder's on the right.

    Args:
        together: ranks have prompts of their own, and each makes passes until all have ended.
        stopping: transformers' criteria that end an answer as well, from the tokens before it.
    """
    forget_lengths(model)
    longest, writes = max(map(len, prompts)), is_writer(model)
    device = next(model.parameters()).device

    def rows(values: list[list[int]], padding: int) -> Tensor:
        gaps = [[padding] * (longest - len(row)) for row in values]
        pairs = zip(values, gaps, strict=True)
        return torch.tensor([r + gap if writes else gap + r for r, gap in pairs], device=device)

    made = model.generate(
        input_ids=rows(prompts, pad_id),
        attention_mask=rows([[1] * len(prompt) for prompt in prompts], 0),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_id,
        eos_token_id=stops or None,
        stopping_criteria=stopping and stopping(1 if writes else longest),
        **({"synced_gpus": True} if together else {}),
    )
    answers: list[list[int]] = made[:, 1 if writes else longest :].tolist()
    return answers


def is_writer(model: Any) -> bool:
    """Whether an encoder reads the prompt; the decoder begins with a token of its own."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def learned_positions(model: Any) -> int | None:
    """The longest sequence of a model whose positions are rows of a table; None for others."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    # Some models (OPT, BART) keep two rows in front for positions that are not used.
    learned = limit is not None and any(0 <= t.num_embeddings - limit <= 2 for t in tables)
    return limit if learned else None
