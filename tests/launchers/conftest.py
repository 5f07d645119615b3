"""One Ray for all files: a cluster takes half a minute to start."""

from collections.abc import Iterator

import pytest
from ray_cluster import Cluster, cluster


@pytest.fixture(scope="session")
def ray() -> Iterator[Cluster]:
    with cluster() as found:
        yield found
