"""What loading has to say of the records that it took: nothing is left out in silence."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Remarks:
    """Counts over the records that were taken.

    Attributes:
        ignored: records or messages with a field that nothing reads, by the field's name.
        control_tokens: special tokens that are typed in texts, by token.
        thinking: answers whose thinking the chat template leaves out, as many templates do of all
            answers but the last.
    """

    ignored: Counter[str] = field(default_factory=Counter)
    control_tokens: Counter[str] = field(default_factory=Counter)
    thinking: int = 0

    def add(self, other: "Remarks") -> None:
        """Count another's as well."""
        self.ignored.update(other.ignored)
        self.control_tokens.update(other.control_tokens)
        self.thinking += other.thinking


def clauses(
    ignored: Mapping[str, int], control_tokens: Mapping[str, int], thinking: int
) -> Iterator[str]:
    """The remarks in words, for the line that ends the loading of a data set."""
    if ignored:
        yield f"ignored fields: {_listed(ignored)}"
    if control_tokens:
        yield f"control tokens typed in texts: {_listed(control_tokens)}"
    if thinking:
        yield (
            f"thinking of {thinking} answer{'s' * (thinking > 1)} before the last left out by the "
            "chat template"
        )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{_plain(name)} {count}" for name, count in counts.items())


def _plain(name: str) -> str:
    """A name of a stranger's file, on one line and short."""
    shown = name if name.isprintable() else ascii(name)
    return shown if len(shown) <= 80 else shown[:77] + "..."


class ControlTokens:
    """Finds the special tokens of a tokenizer in texts that people wrote."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder.values()
        found = {str(token) for token in tokenizer.all_special_tokens}
        found |= {str(token) for token in added if getattr(token, "special", False)}
        self._any = any_of(found)

    def count(self, value: Any) -> Counter[str]:
        """Those in all texts of a value, in which lists and objects may be."""
        return Counter(found for text in _texts(value) for found in self._any.findall(text))


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Any of some tokens that are not blank, the longest first: one may begin with another."""
    names = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
