"""The only file that knows MLflow's model registry: which version of a world is its champion, which its candidate.

A training's world is registered as it is published, under the same name, with a tag that says which artifact it is.
Its files travel as they are (safetensors and JSON, no pickle): a machine that has only the tracking server fetches them
from there.
"""

import logging
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.artifact import Artifact, resolve
from infra.config import Home, TrackingConfig, UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

REFERENCE_TAG = "lampworks.reference"
FINGERPRINT_TAG = "lampworks.fingerprint"
CHAMPION, CANDIDATE = "champion", "candidate"


class RegistryError(UserError):
    """The registry is away, or has no such version."""


def open_registry(config: TrackingConfig, home: Home) -> "Registry | None":
    """The registry of a tracking server, or the home's own; None where the home has none yet."""
    if config.uri is None and not (home.path / "mlflow.db").exists():
        return None
    return Registry(config, home)


class Registry:
    """Versions of worlds and their aliases.

    Args:
        config: which server; the home's embedded store when it names none.
        home: where fetched versions go.
    """

    def __init__(self, config: TrackingConfig, home: Home) -> None:
        self.uri, self.home, self._config = config.uri or home.tracking_uri, home, config
        self._client = connect(self.uri)

    def aliases(self, name: str) -> dict[str, str]:
        """alias -> artifact reference of a registered name; empty when it is not registered.

        Raises:
            RegistryError: the registry does not answer.
        """
        return self._asked(lambda: self._aliases(name))

    def promote(self, reference: str, alias: str = CHAMPION) -> dict[str, str]:
        """Gives an alias to a version, which takes it from another; a champion is no candidate any more.

        A world that the home has and the registry hasn't is registered first.

        Returns:
            The name's aliases afterwards.

        Raises:
            RegistryError: the registry has no such version, or does not answer.
        """
        name, _, wanted = reference.partition("@")

        def change() -> dict[str, str]:
            meant = self._aliases(name).get(wanted, f"{name}@v{wanted.removeprefix('v')}")
            if (self.home.artifacts / name / meant.partition("@")[2]).exists():
                made = resolve(self.home, meant, kind="world")
                about = made.path, made.reference, made.fingerprint
                register(self._client, experiment_id(self._client, self._config, self.home), None, *about)
            found = self._version(name, meant)
            self._client.set_registered_model_alias(name, alias, found.version)
            if alias == CHAMPION and self._aliases(name).get(CANDIDATE) == found.tags[REFERENCE_TAG]:
                self._client.delete_registered_model_alias(name, CANDIDATE)
            return self._aliases(name)

        return self._asked(change)

    def fetch(self, reference: str) -> Artifact:
        """A version's artifact, from the home or, where that lacks it, downloaded into it; every file verified.

        Raises:
            RegistryError: the registry has no such version, or does not answer.
            ArtifactError: files differ from what was published.
        """
        name, _, version = reference.partition("@")
        target = self.home.artifacts / name / version
        if not target.exists():
            staging = self.home.artifacts / name / f".fetch-{uuid.uuid4().hex}"
            staging.mkdir(parents=True)
            fetched = self._asked(lambda: self._download(name, reference, staging))
            with suppress(OSError):  # another process has fetched it meanwhile
                fetched.rename(target)
            shutil.rmtree(staging, ignore_errors=True)
        return resolve(self.home, reference)

    def _download(self, name: str, reference: str, folder: Path) -> Path:
        from mlflow.artifacts import download_artifacts

        model = self._client.get_logged_model(self._version(name, reference).tags["lampworks.model"])
        log.info("registry: fetching %s from %s", reference, self.uri)
        return Path(download_artifacts(model.artifact_location, dst_path=str(folder), tracking_uri=self.uri))

    def _aliases(self, name: str) -> dict[str, str]:
        found = self._client.search_registered_models(f"name = '{name}'", max_results=1)
        aliases = found[0].aliases if found else {}
        tags = {v: self._client.get_model_version(name, v).tags for v in set(aliases.values())}
        return {a: tags[v][REFERENCE_TAG] for a, v in aliases.items() if REFERENCE_TAG in tags[v]}

    def _version(self, name: str, reference: str) -> Any:
        found = self._client.search_model_versions(f"name = '{name}' and tags.`{REFERENCE_TAG}` = '{reference}'")
        if not found:
            known = self._client.search_model_versions(f"name = '{name}'")
            there = ", ".join(sorted(v.tags.get(REFERENCE_TAG, "?") for v in known)) or "nothing"
            raise RegistryError(f"{reference} is not in the registry at {self.uri}: under {name} there is {there}")
        return found[0]

    def _asked(self, question: Any) -> Any:
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException

        try:
            return question()
        except (MlflowException, RequestException, OSError) as error:
            first = str(error).split("\n")[0][:120]
            raise RegistryError(
                f"the registry at {self.uri} does not answer ({first}): start it, or mend the address"
            ) from error


def register(
    client: "MlflowClient", experiment: str, run_id: str | None, path: Path, reference: str, fingerprint: str
) -> None:
    """Registers a published artifact with its files: as candidate, or as champion where there is none.

    Done again it changes nothing.
    """
    from mlflow.exceptions import MlflowException

    name = reference.partition("@")[0]
    same = f"name = '{name}' and tags.`{REFERENCE_TAG}` = '{reference}' and tags.`{FINGERPRINT_TAG}` = '{fingerprint}'"
    if client.search_model_versions(same):
        return
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    model = client.create_logged_model(experiment, name=name, source_run_id=run_id)
    client.log_model_artifacts(model.model_id, str(path))
    client.finalize_logged_model(model.model_id, "READY")
    tags = {REFERENCE_TAG: reference, FINGERPRINT_TAG: fingerprint, "lampworks.model": model.model_id}
    place = model.artifact_location
    served = model.model_id if place.startswith("mlflow-artifacts:") else None  # a server lets no other file be named
    made = client.create_model_version(name, place, run_id, tags, model_id=served)
    held = client.get_registered_model(name).aliases
    client.set_registered_model_alias(name, CANDIDATE if CHAMPION in held else CHAMPION, made.version)


def experiment_id(client: "MlflowClient", config: TrackingConfig, home: Home) -> str:
    """The configured experiment, made where there is none; files of the embedded store go to the home."""
    found = client.get_experiment_by_name(config.experiment)
    if found is not None:
        return found.experiment_id
    files = None if config.uri else (home.path / "mlartifacts").as_uri()
    return client.create_experiment(config.experiment, artifact_location=files)


def connect(uri: str) -> "MlflowClient":
    """A client of a tracking server or store, which answers or fails soon and says little."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # a new store tells of every migration
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)
