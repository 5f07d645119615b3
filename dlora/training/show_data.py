"""`dlora data --config FILE`: records as the model sees them, and what became of all of them.

No weights are read, and no sequence stays in memory but those that are shown.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlora.base.gguf import gguf_tokenizer
from dlora.base.model import find_base, quiet_libraries
from dlora.config.adapters import configs_of
from dlora.config.load import Config, parse
from dlora.data import NO_TARGET
from dlora.data.encode import SECOND, Int32Array, count_targets
from dlora.data.files import is_builtin, sources_of
from dlora.data.reading import Encoded, Reading
from dlora.data.sampler import shown
from dlora.errors import UsageError
from dlora.registry import option
from dlora.tasks import TASKS
from dlora.training.prepare_data import labels_in_data, reading_of, with_template

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"


@dataclass(frozen=True)
class Show:
    """How much is printed."""

    show: int = option(3, "records of each data set to print", ge=0)


def main(argv: list[str]) -> int:
    """Print records and statistics; returns the exit status."""
    options = parse(argv, prog="dlora.data", extra=Show)
    if options.check:
        raise UsageError("--check is an option of dlora.train; dlora.data trains nothing anyway")
    for adapters, config in apart(options.config):
        if adapters:
            print(f"adapters: {', '.join(adapters)}")
        tokenizer = with_template(config, tokenizer_of(config))
        for name in ("train", "eval"):
            if getattr(config.data, name) is not None:
                for line in lines_of(config, name, tokenizer, options.extra.show, in_colour()):
                    print(line)
    return 0


def apart(config: Config) -> list[tuple[list[str], Config]]:
    """(names, configuration) of the adapters that have the same data; of one run, its own."""
    found: dict[str, tuple[list[str], Config]] = {}
    for name, own in configs_of(config).items():
        found.setdefault(repr(own.data), ([], own))[0].append(name)
    return list(found.values()) or [([], config)]


def tokenizer_of(config: Config) -> Any:
    """The tokenizer of `model.path`; a .gguf file is not converted for it."""
    path = Path(config.model.path).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        quiet_libraries()
        return gguf_tokenizer(path)
    trusted = config.model.trust_remote_code
    return find_base(
        config.model.path, revision=config.model.revision, trust_remote_code=trusted
    ).tokenizer()


def in_colour() -> bool:
    """Whether targets are coloured; brackets mark them elsewhere (see no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def lines_of(config: Config, name: str, tokenizer: Any, count: int, colour: bool) -> Iterator[str]:
    """What is printed of `data.train` or `data.eval`.

    Args:
        count: records to show; those without a target are counted only.

    Raises:
        UsageError: as of a run.
    """
    source, key = getattr(config.data, name), f"data.{name}"
    most = config.data.max_eval_samples if name == "eval" else None
    kind = TASKS[config.train.task]
    labels = labels_in_data(config) if kind.draws_head else ()
    reading = Reading(source, key=key, most=most, **reading_of(config, tokenizer, kind(labels)))
    lengths: list[int] = []
    parts: list[int] = []
    for one in reading:
        lengths.append(len(one.input_ids))
        parts.append(one.part)
        if len(lengths) <= count:
            targets = count_targets(one.labels)
            yield f"--- {key}, record {len(lengths)}: {lengths[-1]} tokens, {targets} targets"
            yield marked(one, tokenizer, colour, labels)
    reading.check()
    report = reading.report
    if count:
        yield "---"
    yield f"{key}: {report}"
    low, middle, high = np.percentile(lengths, [0, 50, 95], method="nearest")
    yield f"  lengths: min {low}, median {middle}, p95 {high}, max {max(lengths)} tokens"
    share = report.targets / sum(lengths)
    yield f"  targets: {share:.1%} of {sum(lengths)} tokens ({report.targets})"
    if is_builtin(source) or len(entries := sources_of(source, key)) < 2:
        entries = []
    for part, entry in enumerate(entries):
        size = parts.count(part)
        shows = size * int(entry.weight) + shown(size, entry.weight)
        yield f"  {entry.path}: {size} sequences, shown {shows} times an epoch"


def marked(one: Encoded, tokenizer: Any, colour: bool, labels: Sequence[str] = ()) -> str:
    """A sequence as text with its targets marked; of a classification, followed by its label.

    Of a pair of answers it is both.
    """
    how = tokenizer, colour, labels
    before, after = (_GREEN, _PLAIN) if colour else ("[", "]")
    if labels:
        text = _CONTROL.sub(_escaped, decoded(one.input_ids, 0, len(one.input_ids), tokenizer))
        return f"{text} {before}{labels[int(one.labels[-1])]}{after}"
    for second in np.flatnonzero(one.labels == SECOND).tolist():
        parts = ("chosen", slice(second)), ("rejected", slice(second, None))
        return "\n".join(
            f"{name}: {marked(Encoded(one.input_ids[at], _unmarked(one.labels[at]), 0), *how)}"
            for name, at in parts
        )
    is_target = one.labels >= 0
    cuts = [0, *(np.flatnonzero(np.diff(is_target)) + 1).tolist(), len(is_target)]
    text = ""
    for start, stop in zip(cuts, cuts[1:], strict=False):
        piece = _CONTROL.sub(_escaped, decoded(one.input_ids, start, stop, tokenizer))
        text += f"{before}{piece}{after}" if is_target[start] else piece
    return text


def _unmarked(labels: Int32Array) -> Int32Array:
    return np.where(labels == SECOND, NO_TARGET, labels)


def decoded(ids: Int32Array, start: int, stop: int, tokenizer: Any) -> str:
    """The text of ids[start:stop] where they stand: some tokenizers drop a blank in front."""

    def text(of: Int32Array) -> str:
        kept = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(of.tolist(), **kept))

    head, whole = text(ids[:start]), text(ids[:stop])
    return whole[len(head) :] if whole.startswith(head) else text(ids[start:stop])


def _escaped(found: re.Match[str]) -> str:
    """A control character as Python writes it: a terminal would obey it."""
    return repr(found.group())[1:-1]
