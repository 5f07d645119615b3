"""The data that a run trains on and evaluates on, and the order of its steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dlora.config.chat_template import template_text
from dlora.config.forget import SELF
from dlora.config.load import Config
from dlora.config.sections import record_format
from dlora.data import Dataset, Sampler, check_source, load_examples
from dlora.data.cache import cached
from dlora.data.labelled import labels_of
from dlora.data.reading import labels_in
from dlora.data.stream import Stream, StreamSampler
from dlora.data.template import set_template
from dlora.tasks import Task
from dlora.tasks.limits import Limits

# (key, what loads it) → it: some ranks may get it from another one.
Once = Callable[[str, Callable[[], Dataset]], Dataset]


def by_itself(key: str, load: Callable[[], Dataset]) -> Dataset:
    """Every process loads its data."""
    return load()


def sources(config: Config) -> dict[str, Any]:
    """The data sources by their keys; None for those that there are not."""
    retained = None if config.forget.data == SELF else config.forget.data
    return {"data.train": config.data.train, "data.eval": config.data.eval, "forget.data": retained}


def check_sources(config: Config) -> None:
    """Raise the `UsageError`s of the data that need no tokenizer."""
    for key, source in sources(config).items():
        if source is not None:
            check_source(
                source,
                key=key,
                format=record_format(config),
                on_error=config.data.on_error,
                columns=config.data.columns,
            )


def labels_in_data(config: Config, known: Sequence[str] = ()) -> tuple[str, ...]:
    """The labels of a classification, by a pass over the training data.

    Args:
        known: those of the base, if it has any.
    """
    data = config.data
    found = labels_in(data.train, key="data.train", on_error=data.on_error, columns=data.columns)
    return labels_of(found, config.train.num_labels, known)


def with_template(config: Config, tokenizer: Any) -> Any:
    """The tokenizer with the chat template that the configuration asks for."""
    template = config.data.chat_template
    text = None if template is None else template_text(template)
    set_template(tokenizer, text, config.data.chat_template_kwargs)
    return tokenizer


def sampler_of(
    config: Config, data: Dataset | Stream, limits: Limits, announce: Callable[[str], None]
) -> Sampler | StreamSampler:
    train = config.train
    length = {train.governed_by: getattr(train, train.governed_by)}
    if isinstance(data, Dataset):
        order = (train.seed, config.data.shuffle)
        weights = data.weights
        return Sampler(len(data), train.global_batch_size, *order, **length, weights=weights)
    data.check = functools.partial(limits.check, "data.train")
    sampler = StreamSampler(data, train.global_batch_size, **length)
    if train.governed_by == "epochs":
        announce(f"data.train: {data.report} (counted in a pass of its own, for train.epochs)")
    data.announce = announce
    return sampler


def reading_of(config: Config, tokenizer: Any, task: Task) -> dict[str, Any]:
    """How records are read and encoded: what `Reading` takes beside a source and its key."""
    return {
        "format": record_format(config),
        "tokenizer": tokenizer,
        "max_length": config.data.max_length,
        "on_error": config.data.on_error,
        "columns": config.data.columns,
        "labels": task.labels,
    }


def open_stream(
    config: Config, tokenizer: Any, task: Task, announce: Callable[[str], None]
) -> Stream:
    """`data.train`, read while it is trained on."""
    data, settings = config.data, reading_of(config, tokenizer, task)
    stream = Stream(
        data.train,
        window=data.shuffle_window,
        seed=config.train.seed,
        shuffle=data.shuffle,
        **settings,
    )
    order = f"shuffled in windows of {data.shuffle_window}" if data.shuffle else "not shuffled"
    announce(
        f"data.streaming: sequences are read file after file and {order}; of the first window: "
        f"{stream.report}"
    )
    return stream


def load_data(
    config: Config,
    tokenizer: Any,
    task: Task,
    announce: Callable[[str], None],
    writes: bool,
    once: Once,
    key: str,
) -> Dataset:
    """One of the `sources`, in memory.

    Args:
        writes: to `data.cache_dir` as well.
        key: which of them.
    """
    arguments: dict[str, Any] = {
        "source": sources(config)[key],
        "key": key,
        "most": config.data.max_eval_samples if key == "data.eval" else None,
        **reading_of(config, tokenizer, task),
    }
    load = build = functools.partial(load_examples, **arguments)
    if config.data.cache_dir is not None and writes:
        place = Path(config.data.cache_dir).expanduser()
        load = functools.partial(cached, place, build, announce, **arguments)
    dataset = once(key, load)
    announce(f"{key}: {dataset.report}")
    return dataset


def steps_line(sampler: Sampler | StreamSampler, size: int) -> str:
    """How many steps of how many sequences, in a line."""
    steps = sampler.total_steps
    last = sampler.sequences(steps) - sampler.sequences(steps - 1)
    rest = "" if last == size else f", the last of only {last}"
    return f"train: {steps} optimizer steps of {size} sequences{rest}"
