import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from infra.cluster import SOCKET_PATH_LIMIT, connect, environment, temporary_folder, token_file
from infra.config import ClusterConfig, UserError


def test_workers_start_with_the_environment_and_nothing_is_sent_home(ray_cluster):
    @ray.remote(num_cpus=1)
    def seen():
        return {name: os.environ.get(name) for name in environment()}

    values = ray.get(seen.remote())
    assert values["OMP_NUM_THREADS"] == "1"
    assert values["RAY_USAGE_STATS_ENABLED"] == "0"
    assert values["DS_ACCELERATOR"] == environment()["DS_ACCELERATOR"]


def test_connecting_inside_a_connection_shares_it(ray_cluster):
    before = ray.get_runtime_context().get_job_id()
    with connect(ClusterConfig(cpus=1)):
        assert ray.get_runtime_context().get_job_id() == before
    assert ray.is_initialized()


def test_packages_of_the_project_are_importable_in_workers(ray_cluster):
    @ray.remote(num_cpus=1)
    def where():
        import infra.config

        return infra.config.__file__

    assert Path(ray.get(where.remote())).name == "config.py"


def test_nobody_else_can_read_the_cluster_s_token(ray_cluster):
    assert token_file().stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_who_does_not_show_the_token_does_not_reach_the_cluster(ray_cluster):
    stranger = f"import ray; ray.init(address={ray.get_runtime_context().gcs_address!r}); print(ray.nodes())"
    environ = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
    refused = subprocess.run([sys.executable, "-c", stranger], env=environ, capture_output=True, text=True, timeout=120)
    assert refused.returncode != 0
    assert "NodeManagerAddress" not in refused.stdout
    assert "auth" in refused.stderr.lower()


def test_the_process_environment_wins(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment()["OMP_NUM_THREADS"] == "3"


def test_long_temporary_folders_are_replaced_by_a_short_one(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/" + "x" * 90)
    assert len(str(temporary_folder())) + 70 <= SOCKET_PATH_LIMIT


def test_bad_sizes_are_refused_before_anything_starts():
    with pytest.raises(UserError, match="cluster.cpus is 0"):
        ClusterConfig(cpus=0)
