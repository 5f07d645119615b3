"""A base and an adapter for each test to damage."""

import shutil
from pathlib import Path

import pytest
from exported import Bases, plain_adapter


@pytest.fixture
def base(bases: Bases, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bases("llama"), tmp_path / "base"))


@pytest.fixture
def adapter(bases: Bases, tmp_path: Path) -> Path:
    return plain_adapter(bases, tmp_path / "adapter")
