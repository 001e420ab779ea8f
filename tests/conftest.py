import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}

import pytest

from infra.config import ClusterConfig, Home


@pytest.fixture(scope="session")
def ray_cluster():
    """One Ray for all tests of the session: started once, on a private address."""
    from infra.cluster import connect

    with connect(ClusterConfig(cpus=6)):
        yield


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """MLflow's embedded store, migrated once: a new one costs seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def home(tmp_path):
    """An empty home."""
    return Home(tmp_path / "home").ensure()


@pytest.fixture
def tracked_home(home, empty_store):
    """A home whose tracking store is ready."""
    shutil.copy(empty_store, home.path / "mlflow.db")
    return home
