"""The parser of a command's words, whose errors are one line."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from dlora.errors import UsageError

_REPEATED = ("_AppendAction", "_ExtendAction")  # argparse's names of what adds up


class OneLineParser(argparse.ArgumentParser):
    """argparse, with an error of one line instead of its usage text, also of an option that is
    given twice, of which argparse would take the last."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        seen = set[str]()
        for word in words[: words.index("--") if "--" in words else None]:
            action = self._option_string_actions.get(word.partition("=")[0])
            if action is None or action.nargs == 0 or type(action).__name__ in _REPEATED:
                continue
            if action.dest in seen:
                self.error(f"argument {action.option_strings[0]}: is given twice")
            seen.add(action.dest)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists the options)")
