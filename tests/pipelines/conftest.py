import shutil
import uuid

import pytest

from infra.config import Home
from pipelines.config import TokenizeConfig
from pipelines.tokenize import tokenize
from pipelines.train import train
from tests.pipelines.clips import write_dataset
from tests.pipelines.ranks import config
from tests.pipelines.remote import make_bucket, s3_server


@pytest.fixture(scope="session")
def ground(tmp_path_factory, empty_store, ray_cluster):
    """A home in which every stage can be trained; tests that publish take `place`."""
    home = Home(tmp_path_factory.mktemp("ground") / "home").ensure()
    shutil.copy(empty_store, home.path / "mlflow.db")
    write_dataset(home)
    train(config(home, steps=4))
    train(config(home, steps=4, stage="actions"))
    tokenize(TokenizeConfig(home=home.path, dataset="toys"))
    return home


@pytest.fixture(scope="session")
def endpoint():
    """A real S3 endpoint, host:port."""
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(endpoint):
    """A new bucket: its URI, and the options that name the endpoint."""
    return make_bucket(endpoint, f"b{uuid.uuid4().hex}")


@pytest.fixture
def place(ground, tmp_path):
    """A copy of the ground, to write into."""
    return copy_of(ground, tmp_path / "place")


def copy_of(ground, path):
    """The ground without its trainings."""
    shutil.copytree(ground.path, path, ignore=shutil.ignore_patterns("runs"))
    return Home(path)
