"""The only `ray.init`: a private local cluster by default, or a running one by its address."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import ray

from infra.config import ClusterConfig, UserError

log = logging.getLogger(__name__)

SOCKET_PATH_LIMIT = 107
"""AF_UNIX paths end here (unix(7)); Ray puts about 70 characters after its temporary folder."""

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine starts a proxy in more than the default 5 s
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",  # a killed proxy is replaced after three checks, 10 s apart otherwise
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
"""What every process of a cluster starts with, unless its own environment says otherwise. DeepSpeed reads its
accelerator at import; more than one thread a worker makes two workers on two cores slower than one."""

CHATTY = ("ray", "ray.data", "ray.serve", "ray.train", "ray.tune")
"""Loggers whose lines on the console are about Ray's insides; its log files keep them."""


@contextlib.contextmanager
def connect(config: ClusterConfig | None = None, settings: Mapping[str, str] | None = None) -> Iterator[None]:
    """Joins or starts Ray for the time of the block.

    Inside another `connect` it does nothing: a path of many steps shares one cluster, and each step also works alone.

    Args:
        config: which cluster.
        settings: environment variables for a Ray that is started here, unless this process has others.

    Raises:
        UserError: no cluster answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    config = config or ClusterConfig()
    if config.quiet:
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
    saved = dict(os.environ)
    os.environ.update({**(settings or {}), **environment(), **os.environ})
    try:
        if config.address == "local":
            _start(config)
        else:
            _join(config)
        yield
    finally:
        ray.shutdown()
        os.environ.clear()
        os.environ.update(saved)


def environment() -> dict[str, str]:
    """The workers' environment variables, this process's own values first."""
    chosen = {name: os.environ.get(name, value) for name, value in WORKER_ENVIRONMENT.items()}
    if _has_gpu() and "DS_ACCELERATOR" not in os.environ:
        chosen["DS_ACCELERATOR"] = "cuda"
    return chosen


def _start(config: ClusterConfig) -> None:
    """A private cluster. Workers inherit this environment, which (unlike a runtime_env) costs no start-up."""
    ray.init(
        address="local",
        num_cpus=config.cpus or max(4, os.cpu_count() or 4),
        object_store_memory=config.object_store_bytes,
        include_dashboard=False,
        log_to_driver=not config.quiet,
        logging_level=logging.ERROR if config.quiet else logging.WARNING,
        _temp_dir=str(temporary_folder()),
    )
    with contextlib.suppress(FileNotFoundError):  # Ray writes the cluster's token for everybody to read
        token_file().chmod(0o600)
    log.info("ray started | cpus %d", int(ray.cluster_resources().get("CPU", 0)))


def token_file() -> Path:
    """Where Ray keeps the token that every process of a cluster must show."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def _join(config: ClusterConfig) -> None:
    try:
        ray.init(
            address=config.address,
            log_to_driver=not config.quiet,
            logging_level=logging.ERROR if config.quiet else logging.WARNING,
            runtime_env={"env_vars": environment()},
        )
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster answers at {config.address!r}: start one there, or leave out --cluster.address"
        ) from error
    log.info("ray joined | address %s | nodes %d", config.address, len(ray.nodes()))


def temporary_folder() -> Path:
    """Ray's folder for sockets and logs: short enough for AF_UNIX, one per user."""
    name = f"lampworks-{os.getuid()}"
    folder = Path(tempfile.gettempdir()) / name
    if len(str(folder)) + 70 > SOCKET_PATH_LIMIT:
        folder = Path("/tmp") / name
    return folder


def _has_gpu() -> bool:
    return Path("/dev/nvidia0").exists()
