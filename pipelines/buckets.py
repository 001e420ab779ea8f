"""Folders in object stores that read like local ones, so that tables and plans need not know where they lie.

`place("s3://bucket/prefix")` takes credentials, region and endpoint from the environment as every AWS tool does
(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, ...), or an endpoint from the URI itself:
`s3://bucket/prefix?endpoint_override=host:9000&scheme=http`. Google's `gs://` goes the same way, with Google's default
credentials, or `gs://anonymous@bucket/prefix` where anybody may read.
"""

import functools
import os
import re
import urllib.parse
from collections.abc import Generator, Iterator
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import Any, NoReturn

import pyarrow as pa
from pyarrow import fs
from typing_extensions import override

from infra.config import UserError

SCHEMES = ("s3", "gs")
_ANYBODY = "anonymous@"
_OPTIONS = re.compile(r"\?((?:endpoint_override|scheme|region)=.*)$")


class BucketPath(PosixPath):
    """A file or folder of an object store with those methods of a path that batch work needs.

    A method that is not here would need a local file, and fails with TypeError. The first part is the scheme with who
    asks and the options (`gs:anonymous@?scheme=http`), so the path stands for itself in any process.
    """

    __slots__ = ()

    def __str__(self) -> str:
        """With its options: what `place` takes."""
        scheme, user, query = self._head
        return f"{scheme}://{user}{self.key}{query}"

    @property
    def _head(self) -> tuple[str, str, str]:
        scheme, _, rest = self.parts[0].partition(":")
        user = _ANYBODY if rest.startswith(_ANYBODY) else ""
        return scheme, user, rest.removeprefix(user)

    @override
    def __fspath__(self) -> NoReturn:
        raise TypeError(f"{self} lies in an object store: there is no local file")

    @property
    def uri(self) -> str:
        """Without options: what other engines take, and what a ledger names."""
        return f"{self._head[0]}://{self.key}"

    @property
    def options(self) -> dict[str, str]:
        """Endpoint, scheme and region, where the URI gave them."""
        return dict(urllib.parse.parse_qsl(self.parts[0].partition("?")[2]))

    @property
    def system(self) -> fs.FileSystem:
        """The object store."""
        scheme, user, query = self._head
        surroundings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "GOOGLE_"))))
        return _system(f"{scheme}://{user}{self.parts[1]}{query}", surroundings)

    @property
    def key(self) -> str:
        """Bucket and key."""
        return "/".join(self.parts[1:])

    def _info(self) -> fs.FileInfo:
        return self.system.get_file_info(self.key)

    @override
    def exists(self) -> bool:
        """Whether there is such an object, or one below it."""
        return self._info().type != fs.FileType.NotFound

    @override
    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        return self._info().type == fs.FileType.Directory

    @override
    def stat(self, *, follow_symlinks: bool = True) -> Any:
        """`st_size`, `st_mtime`, `st_mtime_ns` of an object.

        Raises:
            FileNotFoundError: there is none.
        """
        info = self._info()
        if info.type != fs.FileType.File:
            raise FileNotFoundError(f"no object {self}")
        return SimpleNamespace(st_size=info.size, st_mtime=(info.mtime_ns or 0) / 1e9, st_mtime_ns=info.mtime_ns or 0)

    @override
    def open(self, mode: str = "rb", *rest: Any, **named: Any) -> Any:
        """A file to read; objects are written whole, by `write_bytes` and `upload`."""
        if mode != "rb":
            raise TypeError(f"open({mode!r}) of {self}: objects are written whole")
        return self.system.open_input_file(self.key)

    @override
    def read_bytes(self) -> bytes:
        """The whole object."""
        with self.open() as file:
            return file.read()

    @override
    def read_text(self, encoding: str | None = "utf-8", errors: str | None = None) -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding or "utf-8")

    @override
    def write_bytes(self, data: Any) -> int:
        """Writes an object; readers see all of it or nothing."""
        with self.system.open_output_stream(self.key) as stream:
            stream.write(data)
        return len(data)

    @override
    def write_text(self, data: str, *rest: Any, **named: Any) -> int:
        """Writes text as an object, UTF-8."""
        return self.write_bytes(data.encode())

    def upload(self, path: Path) -> None:
        """Copies a local file into this object; it appears whole."""
        fs.copy_files(str(path), self.key, fs.LocalFileSystem(), self.system)

    @override
    def unlink(self, missing_ok: bool = False) -> None:
        """Deletes an object."""
        if not missing_ok or self.exists():
            self.system.delete_file(self.key)

    @override
    def mkdir(self, *rest: Any, **named: Any) -> None:
        """Nothing: object stores have no folders."""

    @override
    def glob(self, pattern: str) -> Generator["BucketPath"]:
        """Objects right below this one whose names match."""
        found = self.system.get_file_info(fs.FileSelector(self.key, allow_not_found=True))
        names = (self / info.base_name for info in found)
        return (path for path in names if path.match(pattern))

    def walk(self) -> Iterator[tuple["BucketPath", fs.FileInfo]]:
        """Every object below this one, at any depth, with its size and time.

        Raises:
            FileNotFoundError: there is nothing.
        """
        for info in self.system.get_file_info(fs.FileSelector(self.key, recursive=True)):
            if info.type == fs.FileType.File:
                yield self / info.path[len(self.key) + 1 :], info


@functools.lru_cache(maxsize=16)
def _system(root: str, surroundings: tuple[tuple[str, str], ...]) -> fs.FileSystem:
    """One client for a bucket as long as the environment, which it reads, is the same."""
    try:
        return fs.FileSystem.from_uri(root)[0]
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{root} can't be opened ({error}): give s3://bucket/prefix") from error


def is_remote(text: str) -> bool:
    """Whether a text names something that is not on this machine."""
    return "://" in text


def is_web(text: str) -> bool:
    """Whether a text is a web address."""
    return text.startswith(("http://", "https://"))


def file_name(location: str) -> str:
    """The last part of a path, web address or object's URI, without options or query."""
    return (
        Path(urllib.parse.unquote(urllib.parse.urlsplit(location).path)).name
        if is_web(location)
        else place(location).name
    )


def place(text: str) -> Path:
    """The path of a local name or of an `s3://` or `gs://` URI.

    Raises:
        UserError: another scheme, or no bucket.
    """
    if not is_remote(text):
        return Path(text)
    scheme, _, rest = text.partition("://")
    if scheme not in SCHEMES:
        raise UserError(f"{text}: {scheme}:// is no object store, give {' or '.join(f'{s}://' for s in SCHEMES)}")
    options = _OPTIONS.search(rest)
    parts = [part for part in _OPTIONS.sub("", rest).split("/") if part]
    if not parts:
        raise UserError(f"{text} names no bucket: give {scheme}://bucket/prefix")
    user = _ANYBODY if parts[0].startswith(_ANYBODY) else ""
    return BucketPath(f"{scheme}:{user}{options.group() if options else ''}", parts[0].removeprefix(user), *parts[1:])


def delta_location(root: Path) -> tuple[str, dict[str, str]]:
    """A table's URI and the storage options that deltalake needs for it beyond the environment."""
    if not isinstance(root, BucketPath):
        return str(root), {}
    given = root.options
    endpoint = given.get("endpoint_override", "")
    if endpoint and "://" not in endpoint:
        endpoint = f"{given.get('scheme', 'https')}://{endpoint}"
    options = {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": given.get("region", "")}
    if (endpoint or os.environ.get("AWS_ENDPOINT_URL", "")).startswith("http://"):
        options["AWS_ALLOW_HTTP"] = "true"
    return urllib.parse.quote(root.uri, safe=":/"), {k: v for k, v in options.items() if v}
