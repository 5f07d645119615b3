"""`dlora library`: adapters of one base on disk, with versions, history and the one that is active.

dlora library add LIB DIR --name N      the next version of N, active from now on
dlora library list LIB                  a line for each name
dlora library show LIB N                versions, where they come from, history
dlora library diff LIB A [B]            settings, shapes, norms
dlora library activate LIB N VERSION    lets others read that version
dlora library rollback LIB N            back to the state before
dlora library remove LIB N              takes the name out; rollback brings it back
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from dlora.errors import UsageError
from dlora.io.files import path_of
from dlora.library.describe import Described
from dlora.library.difference import difference_lines
from dlora.library.index import Entry, Version
from dlora.library.options import as_number, whole
from dlora.library.same_base import base_of_record
from dlora.library.store import Library
from dlora.library.stored import read_adapter
from dlora.runtime.arguments import OneLineParser
from dlora.runtime.exit_status import exit_with


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    args = _parser().parse_args(argv)
    library = Library(path_of(args.library, "LIB"))
    run: Callable[[Library, argparse.Namespace], None] = args.run
    run(library, args)
    return 0


def _add(library: Library, args: argparse.Namespace) -> None:
    metrics = dict(map(_metric, args.metric))
    said = Described(args.parent, metrics, list(map(_tag, args.tag)), args.base)
    version = library.add(args.adapter, args.name, said, activate=not args.no_activate)
    print(f"added {args.name}@{version.number}: {library.objects.place(version)}")


def _list(library: Library, args: argparse.Namespace) -> None:
    index = library.index()
    print(f"base: {index.base}")
    missing = []
    for name, entry in sorted(index.adapters.items()):
        version = entry.version(entry.active or 0)
        shown = "removed" if version is None else _summary(version)
        number = len(entry.versions)
        print(f"  {name:<24} {number} version{'' if number == 1 else 's'}, {shown}")
        missing += [
            f"{name}@{v.number}" for v in entry.versions if not library.objects.place(v).is_dir()
        ]
    if missing:
        raise UsageError(
            f"{library.directory}: the files of {', '.join(missing)} are missing; add them again"
        )


def _show(library: Library, args: argparse.Namespace) -> None:
    index = library.index()
    name, version = args.name, None
    if "@" in name:
        name, version = library.version(index, name)
    entry = library.entry(index, name)
    for each in [version] if version else entry.versions:
        _show_version(library, name, each, entry)
    if version is None:
        print("history:")
        for number, state in enumerate(entry.history, start=1):
            now = "none" if state.active is None else f"{name}@{state.active}"
            back = "" if state.to is None else f" to state {state.to + 1}"
            print(f"  {number:>3}  {state.time}  {state.action}{back}: active {now}")
    for each in [version] if version else entry.versions:
        library.objects.checked(name, each)


def _show_version(library: Library, name: str, version: Version, entry: Entry) -> None:
    mark = " (active)" if version.number == entry.active else ""
    print(f"{name}@{version.number}{mark}, added {version.added}")
    print(f"  files   {library.objects.place(version)}: {', '.join(version.files)}")
    print(f"  base    {base_of_record(version.base)}")
    for parent in version.parents:
        what = parent.get("path") or f"{parent.get('name')}@{parent.get('version')}"
        weight = parent.get("weight")
        print(f"  from    {what}" + ("" if weight is None else f", weight {weight:g}"))
    if version.data:
        print(f"  data    {version.data}")
    if version.metrics:
        print(f"  metrics {_figures(version)}")
    if version.tags:
        print(f"  tags    {', '.join(version.tags)}")


def _diff(library: Library, args: argparse.Namespace) -> None:
    index = library.index()
    name, after = library.version(index, args.name)
    if args.other is not None:
        (first, before), (second, after) = (name, after), library.version(index, args.other)
    else:
        earlier = [v for v in library.entry(index, name).versions if v.number < after.number]
        if not earlier:
            raise UsageError(f"{library.directory}: {name}@{after.number} has no version before it")
        first, second, before = name, name, earlier[-1]
    print(f"{first}@{before.number} -> {second}@{after.number}")
    places = [library.objects.checked(n, v) for n, v in ((first, before), (second, after))]
    for line in difference_lines(*(read_adapter(place, "library diff") for place in places)):
        print(line)


def _activate(library: Library, args: argparse.Namespace) -> None:
    library.activate(args.name, args.version)
    print(f"active: {args.name}@{args.version}")


def _rollback(library: Library, args: argparse.Namespace) -> None:
    print(f"active: {args.name}@{library.rollback(args.name, args.to)}")


def _remove(library: Library, args: argparse.Namespace) -> None:
    library.remove(args.name, purge=args.purge)
    back = "" if args.purge else "; `dlora library rollback` brings it back"
    print(f"{'deleted' if args.purge else 'removed'} {args.name}{back}")


def _metric(word: str) -> tuple[str, float]:
    name, _, text = word.partition("=")
    value = as_number(text)
    if not name.isprintable() or not name or not math.isfinite(value):
        raise UsageError(f"--metric: {word!r}: NAME=NUMBER is expected")
    return name, value


def _tag(word: str) -> str:
    if not word.strip() or not word.isprintable():
        raise UsageError(f"--tag: {word!r}: a tag is a line of text")
    return word


def _summary(version: Version) -> str:
    tags = f" [{', '.join(version.tags)}]" if version.tags else ""
    figures = f": {_figures(version)}" if version.metrics else ""
    return f"active {version.number}{tags}{figures}"


def _figures(version: Version) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in version.metrics.items())


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        "dlora.library",
        "Adapters of one base on disk: versions, where they come from, and which one others read "
        "(LIB/active/NAME).",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., None], meaning: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=meaning, description=meaning)
        added.set_defaults(run=run)
        added.add_argument("library", metavar="LIB", help="directory of the library")
        return added

    add = command("add", _add, "add an adapter as the next version of a name")
    add.add_argument("adapter", metavar="DIR", help="directory of PEFT's files")
    add.add_argument(
        "--name", required=True, metavar="N", help="its name in the library (required)"
    )
    add.add_argument("--tag", action="append", default=[], metavar="TAG", help="may be repeated")
    add.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME=X",
        help="a figure, beside those of its run; may be repeated",
    )
    add.add_argument(
        "--parent",
        action="append",
        default=[],
        metavar="N[@VERSION]",
        help="what it was made from; may be repeated (default: what its run or mix recorded)",
    )
    add.add_argument("--base", metavar="PATH", help="its base (default: what it records)")
    add.add_argument(
        "--no-activate", action="store_true", help="others read the version before (default: no)"
    )
    command("list", _list, "list the names with their active versions")
    _named(command("show", _show, "show versions, where they come from, and history"))
    diff = command("diff", _diff, "compare two adapters: settings, shapes, norms of the updates")
    _named(diff)
    diff.add_argument(
        "other",
        nargs="?",
        metavar="N[@VERSION]",
        help="the one to compare with (default: N's version before against N)",
    )
    activate = command("activate", _activate, "mark the version that others read")
    _named(activate, "N")
    activate.add_argument("version", type=whole(), metavar="VERSION", help="number of the version")
    rollback = command("rollback", _rollback, "go back to an earlier state of a name")
    _named(rollback, "N")
    rollback.add_argument(
        "--to",
        type=whole(),
        metavar="STATE",
        help="number of the state, as show lists them (default: the one before)",
    )
    remove = command("remove", _remove, "take a name out")
    _named(remove, "N")
    remove.add_argument(
        "--purge",
        action="store_true",
        help="delete its versions and files too, for good (default: rollback brings it back)",
    )
    return parser


def _named(parser: argparse.ArgumentParser, shown: str = "N[@VERSION]") -> None:
    parser.add_argument("name", metavar=shown, help="a name, or one of its versions")


if __name__ == "__main__":
    exit_with(main)
