"""A data set that every machine already has: docstrings of Python's own standard library.

Each record is a chat: the signature of a function, method or class, answered by the first sentence
of its docstring, as that line is in the source. The text is parsed with `ast`; nothing is
imported or executed. Two parts:

    builtin:docstrings           for training
    builtin:docstrings-heldout   for evaluation

A hash of the sentence, not of the record, decides the part, so that no held-out sentence is also
trained on (letter case aside). The records depend on the interpreter's version and on nothing else.

As pairs of answers (`data.format: preference`) each has the docstring of another definition as the
worse answer.
"""

import ast
import gc
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from dlora.errors import UsageError

SYSTEM = "You write Python docstrings."
PREFIX = "builtin:"
NAMES = ("docstrings", "docstrings-heldout")

# One sentence in HELD_OUT_SHARE is held out: 128 to 256 pairs on CPython 3.11 to 3.13.
HELD_OUT_SHARE = 40
SIGNATURE_CHARACTERS = 300
SENTENCE_CHARACTERS = 400
# Test suites repeat the sentences of what they test; site-packages is not the library.
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})

# Fields with statements; expressions contain no definitions, so they are not visited.
_STATEMENT_FIELDS = ("body", "handlers", "orelse", "finalbody", "cases")
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
# A sentence ends at . ! or ? before white space, unless it ends an abbreviation.
_SENTENCE_END = re.compile(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\betc)(?<!\bcf)[.!?][\"')\]]*(?=\s|$)"
)


def builtin_records(name: str) -> list[dict[str, Any]]:
    """The chat records of `builtin:<name>`, in a fixed order.

    Args:
        name: "docstrings" or "docstrings-heldout".

    Raises:
        UsageError: the interpreter has no source text of its library.
    """
    held_out = name == "docstrings-heldout"
    return [
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": signature},
                {"role": "assistant", "content": f'    """{sentence}"""'},
            ]
        }
        for signature, sentence in _pairs()
        if is_held_out(sentence) == held_out
    ]


def as_pairs(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same records with a worse answer each: that of the record half of all further on.

    Where that says the same, the next one that says something else.
    """
    answers = [record["messages"][-1:] for record in records]
    pairs = []
    for number, record in enumerate(records):
        start = number + len(records) // 2
        turned = (answers[(start + i) % len(answers)] for i in range(len(answers)))
        rejected = next(answer for answer in turned if answer != answers[number])
        prompt = record["messages"][:-1]
        pairs.append({"prompt": prompt, "chosen": answers[number], "rejected": rejected})
    return pairs


def is_held_out(sentence: str) -> bool:
    """Whether every pair with this sentence, letter case and final stop aside, is held out."""
    digest = hashlib.sha256(sentence.casefold().rstrip(" .!?").encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


def first_sentence(docstring: str) -> str:
    """The docstring's first sentence, every run of white space made one blank.

    It ends at the first full stop of the first paragraph, or with the paragraph.
    """
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    text = " ".join(paragraph.split())
    end = _SENTENCE_END.search(text)
    return text[: end.end()] if end else text


@lru_cache(maxsize=1)
def _pairs() -> tuple[tuple[str, str], ...]:
    """All (signature, sentence) pairs, in the order of files and lines, without duplicates."""
    root = Path(sysconfig.get_paths()["stdlib"])
    pairs: dict[tuple[str, str], None] = {}
    # Syntax trees have no reference cycles, but collecting while they grow doubles the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for path in _library_files(root):
            for pair in _file_pairs(path, ".".join(_module(path.relative_to(root)))):
                pairs[pair] = None
    finally:
        if collecting:
            gc.enable()
    if not pairs:
        raise UsageError(
            f"{PREFIX}docstrings: no Python source under {root}; this interpreter has no source "
            "text of its library; set data.train to a file instead"
        )
    return tuple(pairs)


def _library_files(root: Path) -> list[Path]:
    """The library's source files without test suites, sorted by their path's parts."""
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        # Pruned here: site-packages may have a hundred times the library's files.
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found, key=lambda path: path.parts)


def _module(path: Path) -> tuple[str, ...]:
    parts = path.with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _file_pairs(path: Path, module: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # a file that this interpreter cannot read is not part of its library
    yield from _body_pairs(tree, module)


def _body_pairs(node: ast.AST, qualified: str) -> Iterator[tuple[str, str]]:
    """Pairs of the definitions among a node's statements, outer before inner, in line order."""
    for field in _STATEMENT_FIELDS:
        for child in getattr(node, field, ()):
            if not isinstance(child, _Definition):
                yield from _body_pairs(child, qualified)  # a definition under `if` or `try`
                continue
            name = f"{qualified}.{child.name}"
            docstring = ast.get_docstring(child, clean=False)
            if docstring and _is_usable(sentence := first_sentence(docstring)):
                yield _signature(child, name), sentence
            yield from _body_pairs(child, name)


def _is_usable(sentence: str) -> bool:
    """At least two words, and short enough to be a sentence rather than a table."""
    return " " in sentence and len(sentence) <= SENTENCE_CHARACTERS


def _signature(node: _Definition, name: str) -> str:
    """The definition's first line, its arguments cut to SIGNATURE_CHARACTERS in all."""
    if isinstance(node, ast.ClassDef):
        head, inside = "class", ", ".join(ast.unparse(base) for base in node.bases)
        line = f"{head} {name}({inside})" if inside else f"{head} {name}"
    else:
        head = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        line = f"{head} {name}({ast.unparse(node.args)})"
    return line if len(line) <= SIGNATURE_CHARACTERS else line[: SIGNATURE_CHARACTERS - 4] + "...)"
