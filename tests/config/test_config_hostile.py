"""Any words and any file: a configuration or one line of error, never anything else."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling import full

from dlora.config.load import SCHEMA, Config, parse
from dlora.errors import UsageError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
KEYS = st.sampled_from(sorted(SCHEMA)) | st.text(max_size=12)
SECTIONS = st.sampled_from(sorted({key.partition(".")[0] for key in SCHEMA})) | st.text(max_size=6)
OPTIONS = st.sampled_from(sorted({key.rpartition(".")[2] for key in SCHEMA})) | st.text(max_size=6)
REQUIRED = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "output": {"dir": "o"}}
TREES = st.dictionaries(SECTIONS, VALUES | st.dictionaries(OPTIONS, VALUES, max_size=4), max_size=4)
FILES = st.one_of(
    st.binary(max_size=80),
    st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass")),
    TREES.map(lambda tree: _dumped(tree)),
    TREES.map(lambda tree: _dumped(REQUIRED | tree)),
)
WORDS = st.lists(
    st.tuples(KEYS, VALUES).map(lambda pair: [f"--{pair[0]}", str(pair[1])])
    | st.text(max_size=12).map(lambda word: [word]),
    max_size=3,
)


def _dumped(tree: Any) -> bytes:
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("examples", [150, full(2000)])
def test_any_file_and_words_are_a_configuration_or_one_line(examples: int, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"

    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(FILES, WORDS)
    def check(content: bytes, words: list[list[str]]) -> None:
        path.write_bytes(content)
        argv = ["--config", str(path), *(word for pair in words for word in pair)]
        try:
            assert isinstance(parse(argv, "dlora.train").config, Config)
        except UsageError as error:
            assert str(error) and "\n" not in str(error)
        except SystemExit as stop:  # --help and the like
            assert not stop.code

    check()
