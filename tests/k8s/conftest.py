"""The images of k8s/Dockerfile, built once."""

from pathlib import Path

import k8s_dockerfile
import pytest
from k8s_dockerfile import Image


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """One of the two."""
    return k8s_dockerfile.build(tmp_path_factory.mktemp("image") / "stages", request.param)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("k8s")
