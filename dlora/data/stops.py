"""The tokens that end a generated answer: those that end the answers which are trained on."""

from collections.abc import Iterable, Sequence
from typing import Any

from dlora.data.chat import ChatRenderer
from dlora.data.encode import Encoder
from dlora.data.formats import RecordError
from dlora.errors import UsageError

_PROBE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]


def turn_ends(tokenizer: Any) -> list[int]:
    """What ends an answer in the tokenizer's chat template; without one, what ends a text."""
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if not tokenizer.chat_template:
        return own
    try:
        renderer = ChatRenderer(tokenizer, "")
        encoder = Encoder(tokenizer, special_tokens=False, key="")
        encoder.encode([renderer.render([dict(turn) for turn in _PROBE])])
    except (RecordError, UsageError):  # a template of another use, or a slow tokenizer
        return own
    return encoder.ends


def stop_tokens(tokenizer: Any, of_base: Any, ends: Iterable[int]) -> list[int]:
    """All tokens that end what a model generates.

    Args:
        of_base: `eos_token_id` of the model's generation settings: None, one or a list.
        ends: what ended the answers of the training.
    """
    base = of_base if isinstance(of_base, list | tuple) else [of_base]
    found = {*base, tokenizer.eos_token_id, *ends}
    return sorted(int(end) for end in found if end is not None)


def until_stop(ids: Sequence[int], stops: Iterable[int]) -> list[int]:
    """The tokens before the first that ends an answer."""
    ends = set(stops)
    first = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:first])
