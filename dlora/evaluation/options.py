"""The command line of `dlora eval`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from dlora.base.model import DTYPES
from dlora.base.native import AUTO_DTYPE
from dlora.cli import OneLineParser
from dlora.config.load import SCHEMA
from dlora.config.output import Score
from dlora.data import FORMATS
from dlora.errors import UsageError
from dlora.io.files import path_of
from dlora.sharding.topology import BASES

ALWAYS = ("loss", "perplexity")  # measured whatever --metrics says
AS_RUN = "default: as in the run that wrote the adapter, else "


def parse(argv: list[str], writes: bool = True) -> argparse.Namespace:
    """The options, checked as far as that needs no file that is read.

    Args:
        writes: whether this rank is the one that does.

    Raises:
        UsageError: one of them is wrong, or cannot act beside the others.
    """
    args = _parser().parse_args(argv)
    if args.data is None and not args.tasks:
        raise UsageError("give --data, --tasks, or both")
    args.metrics = list(dict.fromkeys(args.metrics))
    args.scores = [name for name in args.metrics if name not in ALWAYS]
    for option, needed, name in (
        (args.metrics, args.data, "--metrics"),
        (args.format, args.data, "--format"),
        (args.columns, args.data, "--columns"),
        (args.answers, args.scores, "--answers"),
    ):
        if option and not needed:
            other = "--data" if needed is args.data else "--metrics that compare answers"
            raise UsageError(f"{name} cannot act without {other}")
    if args.max_new_tokens is not None and not args.scores:
        raise UsageError("--max-new-tokens cannot act without --metrics that compare answers")
    for option in ("include_path", "few_shot", "apply_chat_template"):
        if getattr(args, option) not in (None, False) and not args.tasks:
            raise UsageError(f"--{option.replace('_', '-')} cannot act without --tasks")
    args.max_new_tokens = args.max_new_tokens or 128
    for option, word in (("--to", args.to), ("--answers", args.answers)):
        if word is not None and writes:
            _new_file(option, path_of(word, option))
    written = [path_of(word, "--to").absolute() for word in (args.to, args.answers) if word]
    if len(set(written)) < len(written):
        raise UsageError("--answers: is the file of --to")
    return args


def _new_file(option: str, path: Path) -> None:
    if path.exists():
        raise UsageError(f"{option}: {path} exists already; name a new file")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{option}: there is no directory {path.absolute().parent}")


def _whole(least: int) -> Callable[[str], int]:
    def number(word: str) -> int:
        if not (word.isascii() and word.isdecimal()) or int(word) < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least}, not {word!r}"
            )
        return int(word)

    return number


def _names(known: tuple[str, ...] = ()) -> Callable[[str], list[str]]:
    """Names with commas between them."""

    def read(word: str) -> list[str]:
        names = [name.strip() for name in word.split(",")]
        for name in names:
            if not name or (known and name not in known):
                expected = f"; expected some of {', '.join(known)}" if known else ""
                raise argparse.ArgumentTypeError(f"{name!r} is no name{expected}")
        return names

    return read


class _Columns(argparse.Action):
    """FIELD=COLUMN …, as a mapping."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        found = {}
        for word in values:
            name, equals, column = word.partition("=")
            if not (name and equals and column):
                parser.error(f"argument {option}: expected FIELD=COLUMN, not {word!r}")
            found[name] = column
        setattr(namespace, self.dest, found)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        "dlora eval",
        "Evaluate a base, or a base with an adapter: held-out loss and perplexity, scores of "
        "answers, and tasks of lm-eval. Under torchrun all ranks share the base and the work.",
    )
    add: Any = parser.add_argument
    add("--base", metavar="PATH", help="hub id, directory or .gguf file (default: the adapter's)")
    add("--adapter", metavar="DIR", help="adapter directory or checkpoint (default: none)")
    _add_data(add)
    _add_tasks(add)
    add(
        "--sharding",
        choices=BASES,
        default="world",
        help="where W0 is stored, as sharding.base: none, a whole copy on each rank, is fastest "
        "where it fits (default: world)",
    )
    dtypes = (*(name for name in DTYPES if name != "float64"), AUTO_DTYPE)
    add("--dtype", choices=dtypes, help=f"dtype of the base ({AS_RUN}bfloat16)")
    packed = get_args(SCHEMA["model.quantization"].type)
    add("--quantization", choices=packed, help=f"packed storage of W0 ({AS_RUN}none)")
    add("--to", metavar="FILE", help="a JSON file to write, which must be new (default: none)")
    add("--trust-remote-code", action="store_true", help="run the base's Python code (default: no)")
    return parser


def _add_data(add: Any) -> None:
    add(
        "--data",
        metavar="FILE",
        help="held-out records, as data.eval; or prompts with a reference, or references, each",
    )
    add("--format", choices=sorted({*FORMATS} - {"labelled"}), help=f"of a record ({AS_RUN}chat)")
    add(
        "--columns",
        nargs="+",
        action=_Columns,
        metavar="FIELD=COLUMN",
        help=f"the column that each field of the format is in ({AS_RUN}none)",
    )
    add("--max-length", type=_whole(2), metavar="N", help=f"longest sequence ({AS_RUN}1024)")
    add(
        "--limit",
        type=_whole(1),
        metavar="N",
        help="use the first N records, and of each task (default: all)",
    )
    known = (*ALWAYS, *get_args(Score))
    add(
        "--metrics",
        type=_names(known),
        default=[],
        metavar="LIST",
        help=f"with commas between them: {', '.join(known)}; the first two are always there "
        "(default: no others)",
    )
    add(
        "--max-new-tokens",
        type=_whole(1),
        metavar="N",
        help="most tokens of an answer (default: 128)",
    )
    add(
        "--batch-size",
        type=_whole(1),
        default=16,
        metavar="N",
        help="sequences of a rank in a pass (default: 16)",
    )
    add("--answers", metavar="FILE", help="a JSON lines file of all answers (default: none)")


def _add_tasks(add: Any) -> None:
    add(
        "--tasks",
        type=_names(),
        default=[],
        metavar="LIST",
        help="tasks of lm-eval: YAML files, or names of those in --include-path, with commas "
        "between them (default: none)",
    )
    add(
        "--apply-chat-template",
        action="store_true",
        help="write the tasks' prompts by the chat template (default: no)",
    )
    add("--include-path", metavar="DIR", help="a directory of lm-eval's task files (default: none)")
    add(
        "--few-shot", type=_whole(0), metavar="N", help="examples in a prompt (default: the task's)"
    )
