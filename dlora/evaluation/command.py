"""`dlora eval`: how good a base, or a base with an adapter, is on a file.

    loss, perplexity    on the records, as a run's `eval_loss`
    --metrics           of greedy answers beside what the records want
    --tasks             benchmarks of lm-eval

One process, or several under torchrun, which share W0 and the work; the numbers are those of all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dlora.data import Dataset, Dealing, load_examples
from dlora.errors import UsageError
from dlora.evaluation.answers import answers_to
from dlora.evaluation.held_out import measure, perplexity
from dlora.evaluation.inference import inference
from dlora.evaluation.metrics import check_installed, scores
from dlora.evaluation.opened import OpenedModel, open_model
from dlora.evaluation.options import parse
from dlora.evaluation.references import (
    Questions,
    has_references,
    lines_of,
    load_prompts,
    questions_of,
)
from dlora.evaluation.tasks import load_tasks, run_tasks
from dlora.io.files import write_atomically
from dlora.runtime.agreement import agree, gather
from dlora.runtime.console import console
from dlora.runtime.exit_status import exit_with
from dlora.runtime.failure import reported
from dlora.runtime.peer_watch import PeerWatch
from dlora.runtime.ranks import Ranks, own_device
from dlora.sharding.topology import Topology, resolve_placement
from dlora.tasks import CAUSAL

JOINING_SECONDS = 600.0
LOADING_SECONDS = 3600.0
DATA = "--data"


def main(argv: list[str], ranks: Ranks | None = None) -> int:
    """The command; returns the exit status.

    Args:
        ranks: that have joined; None: those that torchrun started.
    """
    own = ranks is None
    these = ranks or Ranks.from_environment(JOINING_SECONDS, own_device())
    args = agree(these, "command line", lambda: (parse(argv, these.main), ""))
    topology = _topology(these)

    def work() -> tuple[Evaluation, str]:
        resolve_placement("fsdp2", args.sharding, topology)
        found = prepare(args)
        return found, found.fingerprint

    evaluation = agree(these, "preparation", work)
    with reported(these):
        if own:
            these.join(LOADING_SECONDS)
        _run(evaluation, these, topology)
    if own:
        these.leave()
    return 0


@dataclass
class Evaluation:
    """What is evaluated on what.

    Attributes:
        dataset: for the loss.
        questions: for scores of answers.
        tasks: of lm-eval.
    """

    args: argparse.Namespace
    model: OpenedModel
    dataset: Dataset | None = None
    questions: Questions | None = None
    tasks: list[Any] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """A text that is equal on ranks that evaluate the same."""
        data = self.dataset.fingerprint if self.dataset else ""
        return f"{data} {self.model.known} {self.model.settings}"


@dataclass
class Result:
    """What was found.

    Attributes:
        figures: by name.
        lines: of `--answers`.
        tasks: {task: {metric: value}} of lm-eval.
    """

    figures: dict[str, float] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)


def prepare(args: argparse.Namespace) -> Evaluation:
    """Open the model and read the data; no weight is read.

    Raises:
        UsageError: something is wrong, named by option, file or line.
    """
    check_installed(args.scores, "--metrics")
    model = open_model(args, console.info)
    found = Evaluation(args, model)
    if args.tasks:
        if model.task.name != CAUSAL.name:
            raise UsageError(f"--tasks: lm-eval's need a language model, not {model.task.name}")
        found.tasks = load_tasks(args.tasks, args.include_path)
    if args.data is None:
        return found
    about = {"max_length": model.settings.max_length, "tokenizer": model.tokenizer}
    several: list[list[str]] | None = None
    if args.format is None and has_references(args.data, DATA):
        if model.task.labels:
            raise UsageError(f"{DATA}: a classification needs records with a text and a label")
        data, several = load_prompts(args.data, key=DATA, task=model.task, most=args.limit, **about)
    else:
        data = load_examples(
            args.data,
            key=DATA,
            format=model.settings.format,
            columns=model.settings.columns,
            labels=model.task.labels,
            most=args.limit,
            **about,
        )
    console.info(f"{DATA}: {data.report}")
    model.limits.check(DATA, data.largest_id, data.report.longest)
    found.dataset = data
    if args.scores:
        about_answers = (model.task, model.tokenizer, model.stops([]), DATA)
        questions = questions_of(data, *about_answers)
        found.questions = Questions(questions.prompts, several or questions.references)
    return found


def measured(evaluation: Evaluation, model: Any, ranks: Ranks) -> Result:
    """All that is asked for, of the loaded model; collective."""
    args, opened, result = evaluation.args, evaluation.model, Result()
    with inference(model):
        if (data := evaluation.dataset) is not None:
            deal = Dealing(args.batch_size, packs=opened.packs)
            found = measure(opened.task, model, data, deal, opened.collate, ranks)
            result.figures, result.tokens = dict(found.figures), found.tokens
            if not opened.task.labels:
                result.figures["perplexity"] = perplexity(found.figures["loss"])
        if (questions := evaluation.questions) is not None:
            stops = opened.stops(model.generation_config.eos_token_id)
            answers = answers_to(
                model,
                questions.prompts,
                pad_id=opened.pad_id,
                stops=stops,
                most=args.max_new_tokens,
                rows=args.batch_size,
                ranks=ranks,
            )
            texts = [opened.text(tokens) for tokens in answers]
            if ranks.main:
                result.figures |= scores(args.scores, texts, questions.references)
                result.lines = list(lines_of(questions, texts, opened.text))
        if evaluation.tasks:
            result.tasks = run_tasks(
                evaluation.tasks,
                opened,
                model,
                ranks,
                rows=args.batch_size,
                limit=args.limit,
                few_shot=args.few_shot,
                as_chat=args.apply_chat_template,
            )
    return result


def report(evaluation: Evaluation, result: Result) -> None:
    """Print the table, and write what `--to` and `--answers` ask for."""
    for line in table(result):
        console.info(line)
    args = evaluation.args
    texts = {
        "--to": args.to and json.dumps(record(evaluation, result), indent=1, ensure_ascii=False),
        "--answers": "\n".join(json.dumps(line, ensure_ascii=False) for line in result.lines),
    }
    for option, word in (("--to", args.to), ("--answers", args.answers)):
        if word is None:
            continue
        try:
            write_atomically(Path(word).expanduser(), f"{texts[option]}\n".encode())
        except OSError as error:
            raise UsageError(f"{option}: cannot write {word}: {error.strerror}") from error
        console.info(f"wrote {word}")


def table(result: Result) -> list[str]:
    """Each figure on a line."""
    rows = [(name, f"{value:.4f}") for name, value in result.figures.items()]
    if result.figures:
        rows.append(("tokens", f"{result.tokens:,}"))
    for task, found in result.tasks.items():
        rows += [
            (f"{task} {name}", f"{value:.4f}" if isinstance(value, float) else str(value))
            for name, value in found.items()
        ]
    wide = max(len(name) for name, _ in rows)
    return [f"{name:<{wide}}  {value:>12}" for name, value in rows]


def record(evaluation: Evaluation, result: Result) -> dict[str, Any]:
    """The result as JSON; what is no finite number is null."""
    args, model = evaluation.args, evaluation.model
    finite = {n: v if math.isfinite(v) else None for n, v in result.figures.items()}
    return {
        "base": model.base.path,
        "adapter": args.adapter,
        "data": args.data,
        "figures": finite,
        "tokens": result.tokens,
        "sequences": len(evaluation.dataset) if evaluation.dataset else 0,
        "tasks": result.tasks,
        "settings": asdict(model.settings) | {"max_new_tokens": args.max_new_tokens},
    }


def _run(evaluation: Evaluation, ranks: Ranks, topology: Topology) -> None:
    """Load, measure and report."""
    peers = PeerWatch(ranks)
    with peers.watching(LOADING_SECONDS):
        model = evaluation.model.load(evaluation.args.sharding, topology, ranks.device)
        ranks.loaded()
    model.register_forward_pre_hook(lambda *_: peers.beat())
    with peers.watching(ranks.timeout_seconds), peers.waiting():
        result = measured(evaluation, model, ranks)
        if ranks.main:
            report(evaluation, result)


def _topology(ranks: Ranks) -> Topology:
    """Ranks and nodes."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    return Topology.over(ranks.rank, gather(ranks, "ranks of a node", here))


if __name__ == "__main__":
    exit_with(main)
