"""Where videos come from: a folder or a manifest, here or in an object store or on the web.

Listing reads nothing but sidecars; the worker that decodes a video fetches it (`fetch`).
"""

import contextlib
import csv
import io
import json
import math
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.config import Home, UserError
from pipelines.buckets import BucketPath, file_name, is_remote, is_web, place
from pipelines.config import CurateConfig, FetchConfig
from pipelines.fetch import FetchError, fault, head, read_small, retried
from pipelines.filters import Metadata

SUFFIXES = tuple(
    f".{kind}"
    for kind in (
        *("mp4", "m4v", "mov", "mkv", "webm", "avi", "flv", "ts", "m2ts", "mpg", "mpeg"),
        *("ogv", "wmv", "3gp", "y4m", "ivf", "h264", "hevc"),
    )
)
MANIFESTS = (".parquet", ".csv", ".jsonl")
LISTERS = 32
"""Sidecars read at once from a remote source: each is a round trip."""


@dataclass(frozen=True)
class Source:
    """One video of a source, before anything of it is read.

    Attributes:
        uri: its name in the ledger: the path in a local folder, or the whole URI.
        location: where a worker finds it.
        size_bytes: None where a listing does not tell.
        etag: of the object, where a listing tells it: with uri and size it says which video this is.
        mtime_ns: None where a listing does not tell.
        name: the video's id.
        metadata: what the sidecar or the manifest says; None until `described`.
        sidecar: where to look for one.
    """

    uri: str
    location: str
    size_bytes: int | None = None
    etag: str | None = None
    mtime_ns: int | None = None
    name: str = ""
    metadata: Metadata = Metadata()
    sidecar: str | None = None


def source_of(config: CurateConfig) -> str:
    """The folder, URI or manifest that a configuration curates."""
    return str(config.source or Home(config.home).raw)


def listed(source: str) -> list[Source]:
    """Every video of a source, sorted by uri; hidden files and downloads in progress are none. Reads no video.

    Raises:
        UserError: no such source, no access to it, no video in it, or a manifest that can't be used.
    """
    suffix = Path(file_name(source)).suffix.lower()
    if suffix in MANIFESTS:
        found = _from_manifest(source, suffix)
    elif is_web(source):
        found = [_web_file(source)]
    else:
        found = _from_folder(source)
    if not found:
        raise UserError(f"no video in {source}: it should hold <id>.mp4 (or mkv, webm, ...) with <id>.info.json")
    return sorted(found, key=lambda s: s.uri)


def described(sources: list[Source]) -> list[Source]:
    """The same with names and metadata from their sidecars, where a manifest did not give them."""
    if not any(s.sidecar and is_remote(s.sidecar) for s in sources):
        return [_described(s) for s in sources]
    with ThreadPoolExecutor(LISTERS) as pool:
        return list(pool.map(_described, sources))


# -- listing -----------------------------------------------------------------------------------------------------


def _wanted(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _from_folder(source: str) -> list[Source]:
    folder = place(source)
    if isinstance(folder, BucketPath):
        return _from_bucket(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give --source a folder of videos, or run `lampworks record` first")
    files = [path for path in folder.rglob("*") if _wanted(path.name) and path.is_file()]
    return [_local(path, str(path.relative_to(folder))) for path in files]


def _local(path: Path, uri: str) -> Source:
    facts = path.stat()
    beside = str(path.with_name(f"{path.stem}.info.json"))
    return Source(uri, str(path.resolve()), facts.st_size, None, facts.st_mtime_ns, path.stem, sidecar=beside)


def _from_bucket(folder: BucketPath) -> list[Source]:
    try:
        objects = dict(folder.walk())
    except OSError as error:
        raise UserError(f"--source {folder} can't be listed: {fault(error).detail}") from error
    found: list[Source] = []
    for path, info in objects.items():
        if _wanted(path.name):
            beside = path.with_name(f"{path.stem}.info.json")
            known = str(beside) if beside in objects else None
            found.append(Source(path.uri, str(path), info.size, None, info.mtime_ns, path.stem, sidecar=known))
    return found


def _web_file(uri: str) -> Source:
    try:
        facts = retried(lambda: head(uri), FetchConfig())
    except FetchError as error:
        raise UserError(f"--source {uri} can't be reached: {error.detail}") from error
    size = facts.get("content-length", "")
    return replace(_web(uri), size_bytes=int(size) if size.isdigit() else None, etag=facts.get("etag"))


def _web(uri: str) -> Source:
    """A web file; its query string does not belong to its name."""
    parts = urllib.parse.urlsplit(uri)
    path = Path(urllib.parse.unquote(parts.path))
    beside = parts._replace(path=urllib.parse.quote(str(path.with_name(f"{path.stem}.info.json"))))
    return Source(uri, uri, name=path.stem, sidecar=beside.geturl())


def _from_manifest(source: str, suffix: str) -> list[Source]:
    rows = _manifest_rows(source, _manifest_bytes(source), suffix)
    if not rows:
        raise UserError(f"manifest {source} is empty: it should have one row a video with its `uri`")
    if "uri" not in rows[0]:
        raise UserError(f"manifest {source} has no column `uri` but {', '.join(rows[0])}: name the videos in `uri`")
    seen: dict[str, Source] = {}
    for number, row in enumerate(rows, 1):
        uri = row.get("uri")
        if not isinstance(uri, str) or not uri:
            raise UserError(f"manifest {source}, row {number}: `uri` is {uri!r}, give the video's path or URI")
        seen.setdefault(uri, _entry(source, uri, row))
    return list(seen.values())


def _manifest_bytes(source: str) -> bytes:
    try:
        return retried(lambda: read_small(source), FetchConfig())
    except FetchError as error:
        raise UserError(f"manifest {source} can't be read: {error.detail}") from error


def _manifest_rows(source: str, data: bytes, suffix: str) -> list[dict[str, Any]]:
    try:
        if suffix == ".parquet":
            return pq.read_table(io.BytesIO(data)).to_pylist()
        text = data.decode("utf-8-sig")
        if suffix == ".csv":
            return [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (pa.ArrowInvalid, ValueError, csv.Error) as error:
        raise UserError(f"manifest {source} is no {suffix[1:]} file ({str(error)[:100]})") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"manifest {source}: every line should be a JSON object with a `uri`")
    return rows


def _entry(manifest: str, uri: str, row: dict[str, Any]) -> Source:
    """A manifest's row: relative paths start at the manifest's folder; a `title` column replaces sidecars."""
    if is_web(uri):
        found = _web(uri)
    elif is_remote(uri):
        found = _object(place(uri), uri)
    elif is_remote(manifest):
        found = _object(place(manifest).parent / uri, "") if not is_web(manifest) else _web(_joined(manifest, uri))
    else:
        path = Path(manifest).parent / uri
        beside = str(path.with_name(f"{path.stem}.info.json"))
        found = Source(uri, str(path.resolve()), name=path.stem, sidecar=beside)
        if path.is_file():
            found = replace(_local(path, uri), name=path.stem)
    size, etag = _number(row.get("size")), row.get("etag")
    found = replace(found, etag=str(etag) if etag else None)
    if size is not None:
        found = replace(found, size_bytes=int(size))
    if "title" not in row:
        return found
    return replace(found, name=_text(row, "id") or found.name, sidecar=None, metadata=_metadata(row, "the manifest"))


def _joined(manifest: str, uri: str) -> str:
    return urllib.parse.urljoin(manifest, urllib.parse.quote(uri))


def _object(path: Path, uri: str) -> Source:
    name = uri or (path.uri if isinstance(path, BucketPath) else str(path))
    return Source(name, str(path), name=path.stem, sidecar=str(path.with_name(f"{path.stem}.info.json")))


# -- sidecars ----------------------------------------------------------------------------------------------------


def _described(source: Source) -> Source:
    if source.sidecar is None:
        if source.metadata.title or source.metadata.problem:
            return source
        return replace(source, metadata=Metadata(problem=f"there is no {source.name}.info.json"))
    name, where = file_name(source.sidecar), source.sidecar
    try:
        info = json.loads(retried(lambda: read_small(where), FetchConfig()))
    except FetchError as error:
        if error.passing and is_remote(where):
            raise UserError(f"{where} can't be read now ({error.detail}): run again later") from error
        problem = f"there is no {name}" if error.reason == "not_found" else f"{name} can't be read: {error.detail}"
        return replace(source, metadata=Metadata(problem=problem))
    except ValueError as error:
        return replace(source, metadata=Metadata(problem=f"{name} can't be read: {str(error)[:100]}"))
    if not isinstance(info, dict):
        return replace(source, metadata=Metadata(problem=f"{name} has no title"))
    return replace(source, name=_text(info, "id") or source.name, metadata=_metadata(info, name))


def _metadata(info: dict[str, Any], where: str) -> Metadata:
    """What yt-dlp or a manifest's row says; anything unexpected is a problem, not an error."""
    title, seconds = info.get("title"), _number(info.get("duration"))
    if not isinstance(title, str) or (where == "the manifest" and not title):
        return Metadata(problem=f"{where} has no title")
    return Metadata(
        title=title,
        description=_text(info, "description"),
        duration_s=seconds if seconds is not None and 0 <= seconds < 1e9 else None,
        side_px=min(sides)
        if len(sides := [s for k in ("width", "height") if (s := _number(info.get(k)))]) == 2
        else None,
        uploader=_text(info, "uploader"),
        webpage_url=_text(info, "webpage_url"),
    )


def _text(info: dict[str, Any], key: str) -> str:
    value = info.get(key)
    return value if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    """A finite number, also one that CSV gives as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    with contextlib.suppress(ValueError, OverflowError):
        number = float(value)
        return number if math.isfinite(number) else None
    return None
