"""`python -m dlora.export`: an adapter or checkpoint → a plain PEFT LoRA, or a merged model.

Without `--merge` only names and shapes of the base matter. With it the base is read and written
block by block (`merged_model`), so that a model of any size merges on a small machine. The
directory `--to` gets its name last, so it is complete.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dlora.adapters.checkpoint_layout import (
    adapted_names,
    in_checkpoint_layout,
    part_line,
    whole_class,
)
from dlora.adapters.open_adapter import open_adapter
from dlora.adapters.recorded import write_labels
from dlora.adapters.save_load import adapter_files, save_adapter
from dlora.adapters.source import AdapterSource
from dlora.adapters.write import converted_line, write_files
from dlora.base.answering import write_beside_adapter, write_into_model
from dlora.base.low_rank import low_ranks
from dlora.base.model import DTYPES, BaseModel
from dlora.base.stored_base import StoredBase
from dlora.cli import answering, chosen_base, naming_base, new_target
from dlora.errors import UsageError
from dlora.export.gguf_files import write_gguf
from dlora.export.gguf_layout import Layout
from dlora.export.merged_model import MergedModel
from dlora.export.serving import serving_lines
from dlora.io.files import new_directory
from dlora.lora.merge import rounding_line
from dlora.lora.tasks import HEADS
from dlora.metrics.progress import CopyDisplay
from dlora.runtime.arguments import OneLineParser
from dlora.runtime.exit_status import exit_with

PLAIN = ("peft", "lora")  # of --format: two names of one


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    args = _parser().parse_args(argv)
    if args.dtype and not args.merge:
        raise UsageError("--dtype cannot act without --merge: a plain adapter is always float32")
    if args.format == "adalora" and args.merge:
        raise UsageError("--format: adalora cannot act with --merge: a merged model has no adapter")
    if args.layout != "class" and (args.merge or args.format not in PLAIN):
        raise UsageError("--layout cannot act with --merge or another --format than peft")
    source = open_adapter(args.adapter)
    if (problem := _no_mixture(source, args)) is not None:
        raise UsageError(problem)
    if args.format == "adalora" and source.config.method != "adalora":
        raise UsageError(
            f"--format: adalora needs a checkpoint of an adalora run, but {args.adapter} is "
            f"{source.config.method}"
        )
    if args.format == "gguf" and source.task in HEADS:
        raise UsageError(f"--format: gguf has no head of a classifier ({source.task})")
    target = new_target(args.to, source.directory)
    base, option = chosen_base(
        args.base,
        source,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        announce=print,
    )
    if Path(base.source).is_dir() and Path(base.source).resolve() == target:
        raise UsageError(f"--to: {args.to} is the base itself; name a new directory")
    with naming_base(option):
        skeleton = base.skeleton()
    if low_ranks(base.config()) is not None and (args.merge or args.layout == "checkpoint"):
        what = "--merge" if args.merge else "--layout: checkpoint"
        raise UsageError(
            f"{what}: {base.path} is compressed, so that W0 is a product of two matrices; `dlora "
            "compress --dense` writes whole weights, and --base names them"
        )
    if args.format == "gguf":
        Layout.of(base.config())
    try:
        if args.format == "gguf":
            write_gguf(source, base, skeleton, target, args)
        elif args.merge:
            _merge(source, base, skeleton, target, args.dtype)
        else:
            _write_adapter(source, base, skeleton, target, args)
    except OSError as error:
        raise UsageError(f"--to: cannot write {args.to}: {error.strerror or error}") from error
    print(f"wrote {args.to}")
    return 0


def _no_mixture(source: AdapterSource, args: argparse.Namespace) -> str | None:
    """What is asked of a mixture of experts that it has not, or of another adapter; None: nothing.

    Merged and as one adapter for other programs it exists with its mean gates alone.
    """
    if source.config.method != "mola":
        return "--mean-gates: needs a mixture of experts (mola)" if args.mean_gates else None
    asked = {"--merge": args.merge, f"--format: {args.format}": args.format not in PLAIN}
    asked["--layout: checkpoint"] = args.layout != "class" and not args.mean_gates
    for option, there in asked.items():
        if there:
            return (
                f"{option}: {args.adapter} is a mixture of experts (mola), whose ΔW differs from "
                "token to token; --mean-gates writes the plain LoRA of its mean gates, which can"
            )
    return None


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        "dlora.export",
        "Write an adapter or a checkpoint as a plain PEFT LoRA, or with --merge as a model.",
    )
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="adapter directory or checkpoint (required)"
    )
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="directory to write; new or empty (required)"
    )
    parser.add_argument(
        "--merge", action="store_true", help="write base + adapter as one model (default: no)"
    )
    parser.add_argument(
        "--format",
        choices=(*PLAIN, "adalora", "gguf"),
        default="peft",
        help="peft (or lora): a plain LoRA in PEFT's files; adalora: PEFT's AdaLoRA; gguf: the "
        "adapter, or with --merge the model, for llama.cpp and Ollama (default: peft)",
    )
    parser.add_argument(
        "--layout",
        choices=("class", "checkpoint"),
        default="class",
        help="names of modules: of the class that dlora loads, or of the base's files, which fit "
        "vLLM where the class is the text part of a composite model (default: class)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the merged model (default: as each tensor is stored in the base)",
    )
    parser.add_argument(
        "--mean-gates",
        action="store_true",
        help="of a mixture of experts (mola): one plain LoRA with all experts, each weighted by "
        "its mean gate in training; it is another model (default: no)",
    )
    parser.add_argument(
        "--base",
        metavar="PATH",
        help="hub id, directory or .gguf file (default: the one that the adapter records)",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that comes with the base (default: no)",
    )
    return parser


def _write_adapter(
    source: AdapterSource, base: BaseModel, skeleton, target: Path, args: argparse.Namespace
) -> None:
    stored = StoredBase(base, skeleton) if args.layout == "checkpoint" else None
    source.attach_to(skeleton)
    source.materialize(skeleton)
    with new_directory(target) as folder:
        if args.mean_gates and stored is None:
            write_files(folder, *adapter_files(skeleton, base.source))
        elif stored is None:
            kind = "LORA" if args.format in PLAIN else args.format.upper()
            save_adapter(skeleton, folder, base_model_name_or_path=base.source, peft_type=kind)
        else:
            keys = {name: stored.key_of(name) for name in adapted_names(skeleton)}
            whole = whole_class(skeleton, base.config())
            files = adapter_files(skeleton, base.source)
            write_files(folder, *in_checkpoint_layout(files, keys, whole))
        if source.task in HEADS:
            write_labels(folder, source.labels)
        else:
            write_beside_adapter(folder, base, *_answering(base, source))
    part = part_line(skeleton, base.config()) if stored is None else None
    one = args.format != "adalora" and (source.config.method != "mola" or args.mean_gates)
    served = serving_lines(*adapter_files(skeleton, None)) if one else []
    for line in filter(None, (converted_line(base.path, base.source), part, *served)):
        print(line)


def _answering(base: BaseModel, source: AdapterSource) -> tuple[Any, list[int]]:
    """The tokenizer, if the adapter has a chat template of its own, and what ends an answer."""
    recorded = source.answering
    has_own = recorded.template is not None or recorded.variables
    try:
        tokenizer = base.tokenizer()
    except UsageError:  # weights alone can be exported as well
        if has_own:
            raise
        tokenizer = None
    ends = answering(tokenizer, source)
    return (tokenizer if has_own else None), ends


def _merge(
    source: AdapterSource, base: BaseModel, skeleton, target: Path, dtype: str | None
) -> None:
    stored = StoredBase(base, skeleton)
    new = base.stored(skeleton).lacking if base.made_as.draws_head else []
    source.attach_to(skeleton)
    merged = MergedModel(skeleton, source, stored, DTYPES[dtype] if dtype else None, new)
    if merged.untied:
        print(f"{' and '.join(merged.untied)} no longer share a weight: each is written separately")
    with new_directory(target) as folder, CopyDisplay(merged.nbytes) as display:
        merged.write(folder, display)
        if source.task not in HEADS:  # those of a head write nothing
            write_into_model(folder, base, *_answering(base, source))
    if line := rounding_line(merged.losses, dtype or "the base's dtype"):
        print(f"warning: {line}", file=sys.stderr)


if __name__ == "__main__":
    exit_with(main)
