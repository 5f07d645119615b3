"""The `dlora` command: `dlora train|launch|plan|export|generate …` is `python -m dlora.NAME …`."""

from __future__ import annotations

import importlib
import sys

from dlora.runtime.exit_status import exit_with

COMMANDS = {
    "train": "train adapters; what `torchrun -m dlora.train` runs",
    "launch": "the same on several processes, with torchrun's options",
    "plan": "bytes per rank and on the wire for machines that are not at hand",
    "export": "an adapter or checkpoint → plain PEFT LoRA, or a merged model",
    "generate": "try an adapter, or a base, on a prompt",
}
MODULES = {"plan": "dlora.plan.command", "export": "dlora.export.command"}  # packages


def run(argv: list[str]) -> int:
    """Dispatch to the module of the command."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: dlora COMMAND [options]   (dlora COMMAND --help lists them)\n")
        for name, meaning in COMMANDS.items():
            print(f"  {name:<10}{meaning}")
        return 0 if argv else 2
    command, *rest = argv
    if command not in COMMANDS:
        print(
            f"dlora: error: {command!r} is no command; there are {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    return importlib.import_module(MODULES.get(command, f"dlora.{command}")).main(rest)


def main() -> None:
    """Console script."""
    exit_with(run)


if __name__ == "__main__":
    main()
