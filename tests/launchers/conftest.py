"""One Ray for all files: a cluster takes half a minute to start."""

from collections.abc import Iterator

import pytest
from ray_cluster import Cluster, Clusters


@pytest.fixture(scope="session")
def clusters() -> Iterator[Clusters]:
    made = Clusters()
    yield made
    made.stop()


@pytest.fixture
def ray(clusters: Clusters) -> Cluster:
    """Two nodes, which other tests have used and will use."""
    return clusters.whole()
