"""Runs of several adapters, and of each of them alone."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from ranks import Pools
from run_training import Runs
from together_runs import Together, words_alone

STEPS = 8


@pytest.fixture(scope="module")
def command(words: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """command(directory, adapters=…, **settings): the words of a run of several adapters."""
    own = {"adapter__r": None, "adapter__lora_alpha": None, "train__max_steps": STEPS}
    return functools.partial(words, **own)


@pytest.fixture(scope="module")
def alone(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """alone(member, **settings): the run of one adapter in one process, (tensors, lines)."""
    root = tmp_path_factory.mktemp("alone")

    @functools.cache
    def of(member: str, settings: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        entry = json.loads(member)
        directory = root / f"{entry['name']} {len(list(root.iterdir()))}"
        words = command(directory, adapters=[entry], **json.loads(settings))
        argv = words_alone(words, entry["name"], directory)
        ([result], lines) = Runs(pools, lambda *_, **__: argv, root)(directory.name, 1)
        assert result["status"] == 0
        return result["tensors"], lines

    return lambda member, **settings: of(json.dumps(member), json.dumps(settings))


@pytest.fixture
def together(pools: Pools, command: Any, tmp_path: Path) -> Together:
    return Together(pools, command, tmp_path)
