import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from infra.config import ClusterConfig, Home


@pytest.fixture(scope="session")
def ray_cluster():
    """One Ray for all tests of the session: started once, on a private address."""
    from infra.cluster import connect

    with connect(ClusterConfig(cpus=6)):
        yield


@pytest.fixture
def home(tmp_path):
    """An empty home."""
    return Home(tmp_path / "home").ensure()
