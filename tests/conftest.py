"""What all tests share: the sampled default of `full` matrices, worker pools, a tiny model."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: groups of tests share the cores
os.environ["PYTHONDONTWRITEBYTECODE"] = ""  # as the Makefile has it: tests start many processes

import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from interpreted import Interpreter
from ranks import Pools
from xdist.scheduler.loadscope import LoadScopeScheduling

# Long files start first, so that no core waits for the last one.
LONG_FIRST = ("launchers", "test_readme", "training", "sharding", "methods", "registry")
LONG_FIRST += ("integrations", "plan", "quant", "export", "checkpoint", "adapters")
Words = Callable[..., list[str]]


class OneProcessAFile(LoadScopeScheduling):
    """Tests of a file run in one process, and so do all that need Ray: they share one cluster."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "ray" if "test_ray_" in file else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneProcessAFile:
    """The scheduler of `pytest -n`."""
    return OneProcessAFile(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """All processes of a test run share one folder of traces; see `remembered.py`."""
    gc.disable()  # as long as files are imported: a fifth of the time would look for garbage
    if not hasattr(config, "workerinput"):
        os.environ["DLORA_TEST_TRACES"] = tempfile.mkdtemp(prefix="dlora-traces-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["DLORA_TEST_TRACES"])


def pytest_collection_finish() -> None:
    """A run in this process collects garbage, and what imports have made is none."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `full` run only where `-m` names them."""
    if "full" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    places = [name for name in LONG_FIRST if name in (item.path.parent.name, item.path.stem)]
    return LONG_FIRST.index(places[0]) if places else len(LONG_FIRST)


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    """`pools(n)`: the n worker processes of this test file; see `ranks.py`."""
    made = Pools(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    """A process in which Triton interprets its kernels; see `interpreted.py`."""
    made = Interpreter(tmp_path_factory.mktemp("interpreter"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def words(saved_models: "SavedModels", tmp_path_factory: pytest.TempPathFactory) -> Words:
    """words(directory, model, **settings): the command line of a run on 24 short chats, with
    `BASE_SETTINGS` where `settings` do not say otherwise."""
    from run_training import command_line
    from tiny import save_chats

    data = str(save_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", 24))

    def of(directory: Path, model: str = "llama", **settings: Any) -> list[str]:
        common = {"model__path": saved_models(model), "output__dir": str(directory)}
        return command_line(**common | {"data__train": data} | settings)

    return of


@pytest.fixture(scope="module")
def command(words: Words) -> Words:
    """The command line that `run` is given; a file's own stands in its place."""
    return words


@pytest.fixture
def run(pools: Pools, command: Words, tmp_path: Path) -> Any:
    """run("name", ranks, **settings): `Runs` in the directory of the test."""
    from run_training import Runs

    return Runs(pools, command, tmp_path)


@pytest.fixture
def no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from dlora.base.model import BaseModel

    def read(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(BaseModel, "load", read)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """bases(name): a random base in many small files."""
    from exported import Bases

    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> "SavedModels":
    return SavedModels(tmp_path_factory.mktemp("models"))


class SavedModels:
    """`saved_models("llama")`: the directory of that tiny model, made once."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, name: str, dtype: str = "float32") -> str:
        import torch
        from tiny import save_model

        directory = self._root / f"{name}-{dtype}"
        if not directory.exists():
            save_model(directory, name, getattr(torch, dtype))
        return str(directory)
