"""Prompts, and the answers that are wanted of them.

a data set's records    prompt: all before the first target; reference: the targets, up to what
                        ends an answer
{"prompt": "..." or messages, "reference": "..." or "references": ["...", ...]}
                        one reference or several; the loss is of the first
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dlora.data import NO_TARGET, Dataset, load_examples
from dlora.data.files import read_records
from dlora.data.kinds import Record
from dlora.data.stops import until_stop
from dlora.errors import UsageError
from dlora.tasks import Task

PROMPT, REFERENCE, REFERENCES = "prompt", "reference", "references"


@dataclass(frozen=True)
class Questions:
    """What a model is asked.

    Attributes:
        prompts: token ids.
        references: of each, one or more.
    """

    prompts: list[list[int]]
    references: list[list[str]]

    def first(self, count: int | None) -> Questions:
        """The first of them; None: all."""
        return Questions(self.prompts[:count], self.references[:count])


def questions_of(
    dataset: Dataset, task: Task, tokenizer: Any, stops: Sequence[int], key: str
) -> Questions:
    """The prompts of a data set, with the answers in it.

    Args:
        key: the data set's name, for errors.

    Raises:
        UsageError: the task answers nothing, or a sequence has no prompt.
    """
    if task.labels:
        raise UsageError(
            f"{key}: a classification writes no answers to compare; it has accuracy and f1"
        )
    prompts, references = [], []
    for example in dataset:
        prompts.append(task.prompt(example))
        if len(prompts[-1]) < 2:
            raise UsageError(
                f"{key}: the sequence {example.id + 1} is a text without a prompt, so there is no "
                "answer to compare"
            )
        wanted = until_stop([t for t in example.labels.tolist() if t != NO_TARGET], stops)
        references.append([tokenizer.decode(wanted, skip_special_tokens=True).strip()])
    return Questions(prompts, references)


def has_references(source: str, key: str) -> bool:
    """Whether the records of a file are prompts with references: its first one decides."""
    first = next(read_records(source, key), None)
    keys = first.value.keys() if first else ()
    return PROMPT in keys and (REFERENCE in keys or REFERENCES in keys)


def load_prompts(
    source: str, *, key: str, task: Task, tokenizer: Any, most: int | None, **settings: Any
) -> tuple[Dataset, list[list[str]]]:
    """Prompts with their first references as a data set, and all references.

    Args:
        most: read no more than this many; None: all.
        settings: as for `load_examples`; `format` is the form that the model answers in.

    Raises:
        UsageError: with file and line: a record is not one of these, or does not fit max_length.
    """
    records = list(islice(read_records(source, key), most))
    asked = [_question(record) for record in records]
    as_text = not tokenizer.chat_template
    settings["format"] = task.format or ("text" if as_text else "chat")
    with tempfile.TemporaryDirectory() as made:
        file, line = Path(made) / "records.jsonl", 0
        with file.open("w", encoding="utf-8") as written:
            for record, (prompt, references) in zip(records, asked, strict=True):
                where = int(record.where.rpartition(":")[2])
                written.write("\n" * (where - line - 1))  # so that errors name the line
                content = _as_record(record, prompt, references[0], settings["format"])
                written.write(json.dumps(content) + "\n")
                line = where
        try:
            dataset = load_examples(
                str(file), key=key, tokenizer=tokenizer, labels=task.labels, **settings
            )
        except UsageError as error:
            raise UsageError(str(error).replace(str(file), source)) from None
    if lost := dataset.report.dropped:
        raise UsageError(
            f"{key}: {lost} of {len(records)} prompts leave no token of their reference within "
            f"max_length {settings['max_length']}; raise it or shorten them"
        )
    return dataset, [references for _, references in asked]


def _question(record: Record) -> tuple[Any, list[str]]:
    """(prompt, references) of a record."""

    def fault(what: str) -> UsageError:
        return UsageError(f"{record.where}: {what}")

    value: Mapping[str, Any] = record.value
    if REFERENCE in value and REFERENCES in value:
        raise fault(f"has both {REFERENCE!r} and {REFERENCES!r}; expected one of them")
    references = value.get(REFERENCES, [value.get(REFERENCE)])
    good = isinstance(references, list) and references
    if not good or not all(isinstance(text, str) and text.strip() for text in references):
        raise fault(f"expected a text in {REFERENCE!r}, or a list of texts in {REFERENCES!r}")
    prompt = value.get(PROMPT)
    if (
        not isinstance(prompt, list | str)
        or not prompt
        or (isinstance(prompt, str) and not prompt.strip())
    ):
        raise fault(f"expected a text or a list of messages in {PROMPT!r}")
    if extra := sorted(value.keys() - {PROMPT, REFERENCE, REFERENCES}):
        raise fault(f"has the field {extra[0]!r}, which is not read beside a prompt")
    return prompt, references


def _as_record(record: Record, prompt: Any, reference: str, format: str) -> dict[str, Any]:
    """A prompt with its answer, as a record of a data set."""
    if format == "chat":
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        answer = [{"role": "assistant", "content": reference}]
        return {"prompt": asked, "completion": answer}
    if not isinstance(prompt, str):
        raise UsageError(f"{record.where}: the model has no chat template for a list of messages")
    names = ("text", "label") if format == "labelled" else ("prompt", "completion")
    return dict(zip(names, (prompt, reference), strict=True))


def lines_of(questions: Questions, answers: Sequence[str], decode: Any) -> Iterator[dict[str, Any]]:
    """Each prompt, its references and the answer, for a look at them."""
    triples = zip(questions.prompts, questions.references, answers, strict=True)
    for prompt, references, answer in triples:
        yield {"prompt": decode(prompt), "references": references, "answer": answer}
