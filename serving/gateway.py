"""The doors: REST, the play socket and the player page, as one ASGI application over sessions.

It runs as a Ray Serve deployment (serving/app.py) and, the same, under any ASGI server.
"""

import asyncio
import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, Query, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

from serving.bodies import CREATE_BODY, REFUSED, ForkBody, RolloutBody, StepBody, read_create, read_seed
from serving.config import ServeConfig
from serving.edge import BodyRefused, Edge
from serving.export import session_mp4
from serving.line import Line, Pace
from serving.painter import Painting, check_text
from serving.pictures import fit, read_picture
from serving.play import PlaySocket
from serving.protocol import Problem
from serving.rollouts import Rollouts
from serving.session import Sessions, new_session_id
from serving.store import Session, Store
from serving.worlds import Worlds

PLAYER = Path(__file__).parent / "player"
PAGE_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
PAGE_FILES = {p.name: f"{PAGE_TYPES[p.suffix]}; charset=utf-8" for p in PLAYER.iterdir() if p.suffix in PAGE_TYPES}
Bearer = Annotated[
    HTTPAuthorizationCredentials | None,
    Depends(HTTPBearer(auto_error=False, description="a session's token, or the API key that made it")),
]


class Jpeg(Response):
    """A frame."""

    media_type = "image/jpeg"


class Png(Response):
    """A prompt picture."""

    media_type = "image/png"


class Mp4(Response):
    """A video."""

    media_type = "video/mp4"


class Gateway:
    """Everything a client can reach.

    Args:
        config: the served application's settings.
        worlds: what is served, with prompt pictures.
        store: the journal.
        painter: makes pictures from words; None where prompts in words are not taken.
    """

    def __init__(self, config: ServeConfig, worlds: Worlds, store: Store, painter: Painting | None = None) -> None:
        limits = config.limits
        self.config, self.worlds, self.store, self.painter = config, worlds, store, painter
        self.sessions = Sessions(store, worlds, limits, config.keys)
        self.rollouts = Rollouts(self.sessions)
        self.players = Line("players", limits.live_players, limits.waiting_players)
        self.pace = Pace(limits.steps_per_s)
        self.creating = Line("prompts", limits.creates_at_once, 4 * limits.creates_at_once)
        self.exporting = Line("videos", limits.exports_at_once, 8 * limits.exports_at_once)

    def app(self) -> FastAPI:
        """The ASGI application."""
        app = FastAPI(
            title="Lampworks",
            version="1",
            description="Playable worlds: sessions, steps, forks.",
            responses={"4XX": REFUSED, "5XX": REFUSED},
        )
        app.add_middleware(Edge, config=self.config, rejected=self.sessions.metrics.rejected)
        app.state.metrics = self.sessions.metrics
        app.add_exception_handler(Problem, self._on_problem)  # pyrefly: ignore[bad-argument-type]
        app.add_exception_handler(BodyRefused, self._on_body)  # pyrefly: ignore[bad-argument-type]
        app.add_exception_handler(HTTPException, _on_http)  # pyrefly: ignore[bad-argument-type]
        app.add_exception_handler(RequestValidationError, _on_invalid)  # pyrefly: ignore[bad-argument-type]
        session = "/v1/sessions/{session_id}"
        for method, path, door, answer in (
            ("GET", "/healthz", self.healthz, JSONResponse),
            ("GET", "/readyz", self.readyz, JSONResponse),
            ("GET", "/v1/models", self.list_models, JSONResponse),
            ("GET", "/v1/gallery/{model}/{picture}.png", self.gallery_picture, Png),
            ("GET", "/v1/sessions", self.list_sessions, JSONResponse),
            ("GET", session, self.show, JSONResponse),
            ("POST", session + "/step", self.step, JSONResponse),
            ("POST", session + "/fork", self.fork, JSONResponse),
            ("POST", session + "/replay", self.replay, JSONResponse),
            ("GET", session + "/history", self.history, JSONResponse),
            ("GET", session + "/frames/{n}.jpg", self.frame, Jpeg),
            ("GET", session + "/export.mp4", self.export, Mp4),
            ("POST", "/v1/rollouts", self.roll_out, JSONResponse),
        ):
            app.add_api_route(path, door, methods=[method], response_class=answer)
        app.add_api_route(session, self.delete, methods=["DELETE"], status_code=204)
        app.add_api_route("/v1/sessions", self.create, methods=["POST"], status_code=201, openapi_extra=CREATE_BODY)
        app.add_api_route("/", self.page, methods=["GET"], include_in_schema=False)
        app.add_api_route("/player/{name}", self.page, methods=["GET"], include_in_schema=False)
        app.add_api_websocket_route(session + "/play", self.play)
        return app

    # -- about the server --------------------------------------------------------------------------------------------

    async def healthz(self) -> dict[str, Any]:
        """Whether the gateway runs."""
        return {"status": "ok", "players": self.players.taken}

    async def readyz(self) -> dict[str, Any]:
        """Whether sessions can be created: 503 until every world has a replica."""
        for reference in self.worlds.offered:
            if not await self.worlds[reference].ready():
                raise Problem(503, "not-ready", f"{reference} has no replica yet", retry_after_s=2)
        return {"status": "ready", "models": self.worlds.offered}

    async def list_models(self) -> dict[str, Any]:
        """The worlds that can be played, the default first, with their prompt pictures."""
        live = self.sessions.live()
        models = [
            {
                **vars(self.worlds[r].info), "gallery": list(self.worlds.gallery(r)),
                "aliases": self.worlds.aliases(r), "players": live[r],
            }
            for r in self.worlds.offered
        ]  # fmt: skip
        return {"models": models, "key_needed": bool(self.config.keys), "text_prompts": self.painter is not None}

    async def gallery_picture(self, model: str, picture: str) -> Response:
        """One prompt picture of a world."""
        path = self.worlds.gallery(self.worlds.choose(model, "")).get(picture)
        if path is None:
            raise Problem(404, "no-such-picture", f"{model} has no prompt picture {picture[:80]!r}")
        cache = {"cache-control": "public, max-age=86400"}
        return Png(path.read_bytes(), headers=cache)

    async def page(self, name: str = "index.html") -> Response:
        """The player page and its files."""
        if name not in PAGE_FILES:
            raise Problem(404, "no-such-page", f"there is no {name[:80]!r} here")
        headers = {"cache-control": "no-cache"}
        return Response((PLAYER / name).read_bytes(), media_type=PAGE_FILES[name], headers=headers)

    # -- sessions ----------------------------------------------------------------------------------------------------

    async def list_sessions(
        self, request: Request, authorization: Bearer = None, most: Annotated[int, Query(ge=1, le=100)] = 24
    ) -> dict[str, Any]:
        """The newest sessions of the API key that asks; it opens them too."""
        if not self.config.keys:
            raise Problem(401, "key-needed", "this server knows no API keys, so nobody owns sessions: use their tokens")
        owned = self.store.owned(self._owner(request, authorization), most)
        served = [session for session in owned if session.model in self.worlds]
        return {"sessions": [{**self._describe(s), "playing": self.sessions.is_played(s.id)} for s in served]}

    async def create(self, request: Request, authorization: Bearer = None) -> dict[str, Any]:
        """A session from a picture (multipart `picture`, one or several), base64 (JSON), a gallery id, or words."""
        owner = self._owner(request, authorization)
        async with self.creating.place():
            fields, pictures = await read_create(request)
            session_id, seed = new_session_id(), read_seed(fields.get("seed"))
            reference = self.worlds.choose(fields.get("model"), session_id)
            title = self._title(reference, fields.get("title"))
            frames = await self._prompt(reference, fields, pictures, seed)
            session, token = await self.sessions.create(
                frames, id=session_id, seed=seed, model=reference, owner=owner, title=title
            )
        return {**self._describe(session), "token": token}

    async def _prompt(self, reference: str, fields: Mapping[str, Any], pictures: list[bytes], seed: int) -> np.ndarray:
        """The first frames, uint8 (T, H, W, 3) in the world's shape, by whichever way they were given."""
        info = self.worlds[reference].info
        size = info.height_px, info.width_px
        if fields.get("text") is not None:
            if self.painter is None:
                raise Problem(422, "no-text-prompts", "this server takes no prompts in words: send a 'picture'")
            painted = await self.painter.paint(check_text(str(fields["text"])), seed)
            return fit(painted, *size)[None]
        if fields.get("gallery") is not None:
            path = self.worlds.gallery(reference).get(str(fields["gallery"]))
            if path is None:
                raise Problem(404, "no-such-picture", f"{reference} has no prompt {str(fields['gallery'])[:80]!r}")
            pictures = [path.read_bytes()]
        if not 1 <= len(pictures) <= info.prompt_frames:
            raise Problem(
                422, "bad-prompt", f"{len(pictures)} pictures: send 1 to {info.prompt_frames} as 'picture', or a "
                "'gallery' id", limit=info.prompt_frames,
            )  # fmt: skip
        shape = {"height_px": size[0], "width_px": size[1], "limits": self.config.limits}
        return await asyncio.to_thread(lambda: np.stack([read_picture(p, **shape) for p in pictures]))

    def _title(self, reference: str, given: object) -> str:
        """What a world is to be told about itself; refused where it would not listen."""
        if given in (None, ""):
            return ""
        if not self.worlds[reference].info.words:
            raise Problem(422, "no-title", f"{reference} was trained without titles: leave 'title' out")
        return check_text(str(given))

    async def show(self, session_id: str, authorization: Bearer = None) -> dict[str, Any]:
        """What a session is and where it stands."""
        return self._describe(self._open(session_id, authorization))

    async def delete(self, session_id: str, authorization: Bearer = None) -> Response:
        """Removes a session and its frames."""
        self.store.delete(self._open(session_id, authorization).id)
        return Response(status_code=204)

    async def step(self, session_id: str, body: StepBody, authorization: Bearer = None) -> dict[str, Any]:
        """Takes step n; asked for again, it gives the stored frame."""
        session = self._open(session_id, authorization)
        await self.pace.turn(session.id)
        _, message = await self.sessions.step(session, body.n, body.action)
        return {
            "step": message.step,
            "action": message.action,
            "replayed": bool(message.flags & message.flags.REPLAYED),
            "frame": base64.b64encode(message.jpeg).decode(),
            "timings": vars(message.timings),
        }

    async def fork(
        self, request: Request, session_id: str, body: ForkBody, authorization: Bearer = None
    ) -> dict[str, Any]:
        """New sessions that share the history up to a step. Rewinding is forking and going on in the fork."""
        session = self._open(session_id, authorization)
        if body.n > self.config.limits.forks:
            limit = self.config.limits.forks
            raise Problem(422, "too-many-forks", f"{body.n} forks: at most {limit} at once", limit=limit)
        step = session.step if body.step is None else body.step
        forks = [self.sessions.fork(session, step, session.owner) for _ in range(body.n)]
        return {"sessions": [{**self._describe(s), "token": t} for s, t in forks]}

    async def roll_out(self, body: RolloutBody, authorization: Bearer = None) -> dict[str, Any]:
        """Where rows of actions lead from a step, for agents that look ahead. Nothing is kept: the same request gives
        the same frames, and playing the actions in the session gives them too."""
        session = self._open(body.session, authorization)
        step = session.step if body.step is None else body.step
        rows = await self.rollouts.ahead(session, step, body.actions)
        kept = [frames if body.frames == "all" else frames[-1:] for frames in rows]
        told = [[base64.b64encode(jpeg).decode() for jpeg in frames] for frames in kept]
        return {"session": session.id, "step": step, "frames": told}

    async def replay(
        self, session_id: str, authorization: Bearer = None, steps: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> dict[str, Any]:
        """Computes the first steps again and compares them with the journal, token by token."""
        session = self._open(session_id, authorization)
        different = await self.rollouts.replay(session, steps)
        return {"steps": min(steps, session.step - session.start), "equal": different is None, "differs_at": different}

    async def history(self, session_id: str, authorization: Bearer = None) -> dict[str, Any]:
        """The actions of a session: with the prompt and the seed they determine every frame."""
        session = self._open(session_id, authorization)
        return {**self._describe(session), "history": self.store.actions(session.id)}

    async def frame(self, session_id: str, n: int, authorization: Bearer = None) -> Response:
        """A committed frame."""
        message = self.sessions.stored(self._open(session_id, authorization), n)
        headers = {"cache-control": "private, max-age=86400, immutable"}
        return Jpeg(message.jpeg, headers=headers)

    async def export(self, session_id: str, authorization: Bearer = None) -> Response:
        """The session as a video."""
        session = self._open(session_id, authorization)
        async with self.exporting.place():
            rows = list(self.store.rows(session.id, session.first, session.step))
            video = await asyncio.to_thread(session_mp4, rows, self.worlds[session.model].info.fps)
        name = f'attachment; filename="lampworks-{session.id}.mp4"'
        return Mp4(video, headers={"content-disposition": name})

    async def play(self, socket: WebSocket, session_id: str) -> None:
        """The play socket (serving/play.py)."""
        await PlaySocket(socket, self.sessions, self.config.limits).serve(session_id, self.players)

    # -- helpers -----------------------------------------------------------------------------------------------------

    async def _on_problem(self, request: Request, problem: Problem) -> Response:
        self.sessions.metrics.rejected(problem.slug)
        return _answer(problem)

    async def _on_body(self, request: Request, refused: BodyRefused) -> Response:
        return await self._on_problem(request, refused.problem)

    def _open(self, session_id: str, authorization: Bearer) -> Session:
        return self.sessions.open(session_id, _bearer(authorization))

    def _owner(self, request: Request, authorization: Bearer) -> str:
        """Whose quota a new session counts for: an API key's, or with no keys set the client address's."""
        if not self.config.keys:
            return f"address:{request.client.host if request.client else 'unknown'}"
        owner = self.sessions.owner_of(_bearer(authorization))
        if owner is None:
            raise Problem(401, "key-needed", "creating a session needs an API key: 'Authorization: Bearer <key>'")
        return owner

    def _describe(self, session: Session) -> dict[str, Any]:
        info = self.worlds[session.model].info
        kept = ("model", "seed", "title", "first", "start", "step", "created", "parent", "parent_step")
        about = {name: getattr(session, name) for name in kept}
        size = {"height_px": info.height_px, "width_px": info.width_px}
        return {"session": session.id, **about, "actions": info.actions, "fps": info.fps, **size}


def _bearer(authorization: Bearer) -> str | None:
    return authorization.credentials.strip() or None if authorization else None


def _answer(problem: Problem) -> Response:
    """A refusal as a problem document."""
    return Response(
        json.dumps(problem.body()), problem.status, problem.headers(), media_type="application/problem+json"
    )


async def _on_http(request: Request, error: HTTPException) -> Response:
    slug = str(error.detail).lower().replace(" ", "-")
    detail = f"{request.method} {request.url.path[:80]}: {error.detail}"
    response = _answer(Problem(error.status_code, slug, detail))
    response.headers.update(error.headers or {})
    return response


async def _on_invalid(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return _answer(Problem(422, "invalid-request", f"{where}: {first['msg']}"))
