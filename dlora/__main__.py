"""The `dlora` command: `dlora NAME …` is `python -m dlora.NAME …`, for each name of COMMANDS."""

from __future__ import annotations

import importlib
import sys

from dlora.runtime.exit_status import exit_with

COMMANDS = {
    "train": "train adapters, as `torchrun -m dlora.train` does",
    "launch": "train on several processes, with torchrun's options",
    "data": "print records as the model sees them, with statistics, without weights",
    "plan": "plan memory, traffic and placement for given machines, without weights",
    "export": "write an adapter or checkpoint as a plain PEFT LoRA, or merge it",
    "compose": "make one adapter from several of the same base",
    "library": "keep adapters of one base with versions, history and the active one",
    "analyse": "say what an adapter learned: norms, ranks, directions, similarity",
    "eval": "measure a base or an adapter: held-out loss, scores of answers, lm-eval's tasks",
    "report": "write one page on what runs did: curves, memory, ranks, samples, events",
    "watch": "follow a run's metrics from another shell",
    "teach": "write what a teacher finds likeliest, for distill.teacher",
    "generate": "answer a prompt with a base, or with a base and an adapter",
    "extract": "write what a full fine-tune changed of its base as a plain LoRA",
    "compress": "write a model whose weights are products of two thin matrices",
}
MODULES = {  # of those whose name is a package
    "data": "dlora.training.show_data",
    "plan": "dlora.plan.command",
    "teach": "dlora.training.teach",
    "export": "dlora.export.command",
    "compose": "dlora.library.compose",
    "library": "dlora.library.command",
    "analyse": "dlora.analysis.command",
    "eval": "dlora.evaluation.command",
    "report": "dlora.report.command",
    "watch": "dlora.report.watch",
    "extract": "dlora.library.extract",
    "compress": "dlora.library.compress",
}


def run(argv: list[str]) -> int:
    """Run the command that `argv` begins with; returns its exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: dlora COMMAND [options]   (dlora COMMAND --help lists them)\n")
        for name, meaning in COMMANDS.items():
            print(f"  {name:<10}{meaning}")
        return 0 if argv else 2
    command, *rest = argv
    if command not in COMMANDS:
        print(
            f"dlora: error: unknown command {command!r}; expected one of {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    return importlib.import_module(MODULES.get(command, f"dlora.{command}")).main(rest)


def main() -> None:
    """The console script: run the command line, and exit with its status."""
    exit_with(run)


if __name__ == "__main__":
    main()
