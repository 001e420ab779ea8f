"""Rating clips 1 to 5 by hand, for the quality classifier: a page on this machine alone.

    lampworks label platformers

Keys 1 to 5 rate and go on, Backspace takes back, Space looks again. Every rating is on disk before the next clip is
shown, in `labels.jsonl` beside the dataset; started again, it goes on with what is not rated yet.
"""

import hashlib
import json
import logging
import os
import secrets
import threading
import urllib.parse
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from typing_extensions import override

from infra.config import Home, UserError
from pipelines.buckets import BucketPath
from pipelines.review_config import LabelConfig
from pipelines.shards import Dataset, open_dataset
from pipelines.video import decode_clip, strip

log = logging.getLogger(__name__)

LABELS = "labels.jsonl"
FRAMES, FRAME_PX = 32, 288
MOST_BYTES = 1000
"""Of a request's body; a rating is a few dozen."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def read_labels(folder: Path) -> dict[str, int]:
    """Stars by clip id: a later line replaces an earlier one, and one without stars takes it back.

    A last line that was cut off by a crash is no rating.
    """
    path, stars = folder / LABELS, dict[str, int]()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        stars.pop(row["clip_id"], None)
        if row["stars"]:
            stars[row["clip_id"]] = row["stars"]
    return stars


@dataclass
class Ballot:
    """The clips of a dataset in a drawn order, and their ratings."""

    dataset: Dataset

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self.index = self.dataset.index()
        self.places = {clip: n for n, clip in enumerate(self.index["clip_id"].to_pylist())}
        self.order = sorted(self.places, key=lambda clip: hashlib.sha256(f"label/{clip}".encode()).hexdigest())
        self.stars = read_labels(self.dataset.folder)
        self.history = [clip for clip in self.stars if clip in self.places]

    def next(self) -> dict[str, Any]:
        """The first clip without a rating (None at the end), and how far one is."""
        clip = next((c for c in self.order if c not in self.stars), None)
        return {"clip": clip, "rated": len(self.history), "total": len(self.order)}

    def rate(self, clip: str, stars: int | None) -> None:
        """Writes one rating, on disk when this returns; None takes it back.

        Raises:
            UserError: no such clip, or no such rating.
        """
        if clip not in self.places or (stars is not None and stars not in range(1, 6)):
            raise UserError("a rating is 1 to 5, of a clip of this dataset")
        with self._lock:
            line = json.dumps({"clip_id": clip, "stars": stars}) + "\n"
            with (self.dataset.folder / LABELS).open("ab") as file:
                if file.tell() and not self._ends_whole:
                    file.write(b"\n")
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
            self.stars.pop(clip, None)
            self.history = [c for c in self.history if c != clip]
            if stars:
                self.stars[clip] = stars
                self.history.append(clip)

    @cached_property
    def _ends_whole(self) -> bool:
        """Whether the last line of an earlier run is whole; asked once, before the first rating of this one."""
        return (self.dataset.folder / LABELS).read_bytes().endswith(b"\n")

    def undo(self) -> None:
        """Takes the last rating back."""
        if self.history:
            self.rate(self.history[-1], None)

    def film(self, clip: str) -> bytes:
        """A clip's frames side by side, JPEG; the page runs through them."""
        frames = decode_clip(self.dataset.read_clips(self.index.slice(self.places[clip], 1))[0])
        chosen = frames[np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)]
        width = round(frames.shape[2] * FRAME_PX / frames.shape[1])
        return strip([cv2.resize(f, (width, FRAME_PX), interpolation=cv2.INTER_NEAREST) for f in chosen])


class Door(BaseHTTPRequestHandler):
    """The page's requests. All but the page's own files need the token that only the printed address has."""

    ballot: Ballot
    token: str
    files = {"/": ("label.html", "text/html"), "/label.js": ("label.js", "text/javascript"),
             "/label.css": ("label.css", "text/css")}  # fmt: skip

    def do_GET(self) -> None:
        """The page's files, the next clip, a clip's film."""
        url = urllib.parse.urlsplit(self.path)
        if not self._is_ours():
            return
        if url.path in self.files:
            name, kind = self.files[url.path]
            self._answer(Path(__file__).with_name(name).read_bytes(), kind)
        elif not self._has_token():
            self._refuse(HTTPStatus.FORBIDDEN, "open the address that `lampworks label` printed")
        elif url.path == "/next":
            self._answer_json(self.ballot.next())
        elif url.path.startswith("/film/") and (clip := url.path.removeprefix("/film/")) in self.ballot.places:
            self._answer(self.ballot.film(clip), "image/jpeg")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")

    def do_POST(self) -> None:
        """A rating {"clip", "stars"} or {"undo": true}; answers with the next clip."""
        length = self.headers.get("Content-Length", "")
        if not self._is_ours():
            return
        if not self._has_token() or self.path != "/rate":
            self._refuse(HTTPStatus.FORBIDDEN, "open the address that `lampworks label` printed")
        elif not length.isdigit() or int(length) > MOST_BYTES:
            self._refuse(HTTPStatus.BAD_REQUEST, f"a rating has at most {MOST_BYTES} bytes")
        else:
            try:
                said = json.loads(self.rfile.read(int(length)))
                self.ballot.undo() if said.get("undo") else self.ballot.rate(str(said["clip"]), int(said["stars"]))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                self._refuse(HTTPStatus.BAD_REQUEST, f"no rating: {error}")
                return
            self._answer_json(self.ballot.next())

    def _is_ours(self) -> bool:
        """Refuses names that a foreign page made to point here (DNS rebinding)."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host in ("127.0.0.1", "localhost"):
            return True
        self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "this page answers to 127.0.0.1 only")
        return False

    def _has_token(self) -> bool:
        said = self.headers.get("Authorization", "").removeprefix("Bearer ")
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query).get("token", [""])[0]
        return secrets.compare_digest((said or query).encode(), self.token.encode())

    def _answer_json(self, value: dict[str, Any]) -> None:
        self._answer(json.dumps(value).encode(), "application/json")

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._answer(why.encode(), "text/plain", status)

    def _answer(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        headers = {**HEADERS, "Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    @override
    def log_message(self, format: str, *args: Any) -> None:
        """Requests are no news."""


def open_door(config: LabelConfig) -> tuple[ThreadingHTTPServer, str]:
    """The page's server, not running yet, and the address to open.

    Raises:
        UserError: no such dataset, or the port is taken.
    """
    token = secrets.token_urlsafe(16)
    dataset = open_dataset(Home(config.home), config.dataset)
    if isinstance(dataset.folder, BucketPath):
        raise UserError(f"{dataset.reference} lies in an object store: copy it to this machine to rate its clips")
    door = type("Door", (Door,), {"ballot": Ballot(dataset), "token": token})
    try:
        server = ThreadingHTTPServer(("127.0.0.1", config.port), door)
    except OSError as error:
        raise UserError(f"port {config.port} can't be opened ({error.strerror}): give another --port") from error
    return server, f"http://127.0.0.1:{server.server_address[1]}/#{token}"


def label(config: LabelConfig) -> str:
    """`lampworks label`: serves the page until Ctrl-C.

    Returns:
        How many clips are rated.
    """
    server, address = open_door(config)
    log.info("label | open %s | keys 1 to 5, Backspace, Space | Ctrl-C ends", address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        log.info("label | stopped")
    finally:
        server.server_close()
    return f"{len(read_labels(open_dataset(Home(config.home), config.dataset).folder))} clips are rated"
