"""What all tests share: the sampled default of `full` matrices, worker pools, a tiny model."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: groups of tests share the cores

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import Pools

RunWords = Callable[..., list[str]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `full` run only where `-m` names them."""
    if "full" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    """`pools(n)`: the n worker processes of this test file; see `ranks.py`."""
    made = Pools(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def deepspeed_built() -> None:
    """DeepSpeed compiles a part of itself when it is first used with gloo, which takes longer than
    a call of a pool may on a busy machine; ended halfway, it leaves a lock that nobody frees."""
    code = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=580)


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> "SavedModels":
    return SavedModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def run_words(saved_models: "SavedModels", tmp_path_factory: pytest.TempPathFactory) -> RunWords:
    """`run_words(directory, **settings)`: words for `dlora.train` with 24 chats, a tiny model and
    `BASE_SETTINGS`, where `settings` do not say otherwise."""
    from run_training import command_line
    from tiny import save_chats

    data = save_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", 24)

    def words(directory: Path, *, model: str = "llama", **settings: object) -> list[str]:
        common = {"model__path": saved_models(model), "data__train": str(data)}
        return command_line(**common | {"output__dir": str(directory)} | settings)

    return words


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
