"""What a served world may be told: where it listens, how many players it takes, what it refuses."""

from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from infra.config import ClusterConfig, TrackingConfig, UserError, within
from models.config import SamplerConfig

MAX_ACTIONS = 255
"""An action travels as one byte."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on what a client may ask for. Every refusal names the bound it ran into."""

    picture_bytes: int = 8 * 2**20
    """Largest request body with a prompt picture."""
    picture_px: int = 16_000_000
    """Most pixels of a prompt picture, read from its header before it is decoded."""
    picture_side_px: int = 8
    """Shortest side of a prompt picture."""
    steps: int = 20_000
    """Longest session, in steps."""
    forks: int = 16
    """Most copies one fork request may make."""
    rollout_frames: int = 1024
    """Most frames that one rollout request may compute; twice as many may be asked for by all together."""
    rollouts_at_once: int = 4
    """Rollouts and replays that a gateway computes side by side, each in a slot of the device."""
    live_players: int = 256
    """Players of one gateway at once; the next ones wait in line."""
    waiting_players: int = 64
    """Longest line before a gateway; who comes later is told to come back."""
    creates_at_once: int = 8
    """Prompts that a gateway reads and decodes side by side; four times as many wait."""
    exports_at_once: int = 2
    """Videos that a gateway encodes side by side; eight times as many wait."""
    body_s: float = 60.0
    """Longest time for a request's body to arrive."""
    creates_per_min: int = 120
    """New sessions of one owner (an API key, or a client address) in a minute."""
    stored_bytes: int = 4 * 2**30
    """Journal bytes of one owner."""
    connection_s: int = 20
    """A connection on which nothing is asked for this long is closed, half a request or none."""
    messages_per_s: float = 200.0
    """Messages of one play socket; a burst of twice as many is accepted."""
    steps_per_s: float = 60.0
    """Steps of one session; faster players are slowed down, not refused."""
    idle_s: float = 900.0
    """A play socket without a message for this long is closed."""
    step_timeout_s: float = 60.0
    """How long a step waits for a model replica to come (back) before the client is told to retry."""
    token_days: float = 30.0
    """Age at which a session's token stops working."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise UserError(f"--limits.{name.replace('_', '-')} is {value}: give a number above 0")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """One served application: worlds, the machine's share they get, and the doors."""

    home: Path = Path("lampworks-home")
    """Folder of artifacts and of the session journal."""
    world: str | tuple[str, ...] = "world"
    """Worlds, the first is the default: "world" (the registry's champion, or without one the newest version),
    "world@v2" (always that), or "world@candidate" (any alias)."""
    store: str | None = None
    """Session journal: a file, or redis://host:6379/0 for gateways on several machines; None is the home's own file."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs `keys`."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    replicas: int = 1
    """Model replicas per version of a world, at least; 0 lets a version that nobody plays go until somebody does."""
    max_replicas: int | None = None
    """Model replicas per version at most: between the two, as many as live sessions and their waits ask for."""
    scale_down_s: float = 60.0
    """How long a replica must have been one too many."""
    canary: float = 0.0
    """Share of new sessions of a world that get the registry's candidate instead of its champion."""
    drain_s: float = 60.0
    """A version that new sessions don't get is taken down this long after its last session was played."""
    gateways: int = 1
    """Gateway replicas; with two, players of a killed one reconnect at once."""
    slots: int = 8
    """Sessions that one replica refines together."""
    cache_bytes: int = 2 * 2**30
    """Bound on one replica's session caches; fewer slots are made when they would not fit."""
    device: str = "cpu"
    """Torch device of a replica: cpu, or cuda (one GPU per replica)."""
    threads: int = 1
    """CPU threads of one model replica."""
    sampler: SamplerConfig | None = None
    """How frames are sampled; None takes the sampler's defaults."""
    colocated: bool = False
    """Model inside the gateway replica: one process less, for one machine."""
    proxy: bool = False
    """Ray Serve's proxies before the gateways, as on every cluster; without, players reach the gateways themselves."""
    text: str | None = None
    """Folder or hub name of a diffusers text-to-image pipeline, for prompts in words; none are taken without it."""
    text_steps: int = 4
    """Denoising steps of the text-to-image pipeline."""
    text_guidance: float = 0.0
    """Its guidance scale: 0 for distilled ones (turbo), about 7 for others."""
    keys: tuple[str, ...] = ()
    """SHA-256 (hex) of API keys that may create sessions; none means that everyone who reaches the port may."""
    origins: tuple[str, ...] = ()
    """Web origins, besides the page's own, whose scripts may call."""
    hosts: tuple[str, ...] = ()
    """Host names, besides loopback ones and `host`, that requests may be addressed to."""
    limits: Limits = field(default_factory=Limits)
    """Bounds on clients."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Whose registry says which version is a world's champion."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Which Ray cluster to run on."""

    def __post_init__(self) -> None:
        if not self.worlds:
            raise UserError("--world is empty: name at least one world artifact, such as world@v1")
        if not 0 <= self.port < 65536:
            raise UserError(f"--port is {self.port}: give 0 (any free port) to 65535")
        self._check_replicas()
        within("--canary", self.canary, 0.0, 1.0)
        for name in ("gateways", "slots", "cache_bytes", "threads", "text_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give at least 1")
        if self.sampler and self.sampler.policy == "rolling":
            raise UserError(
                "--sampler.policy is rolling: a rolling cache can't be rebuilt from recent frames after a failure; "
                "serve with epoch or reprefill"
            )
        if not self.loopback and not self.keys:
            raise UserError(
                f"--host {self.host} is reachable from other machines: give --keys (SHA-256 of each API key: "
                "printf %s KEY | sha256sum), or listen on 127.0.0.1 and forward the port with ssh -L"
            )
        for key in self.keys:
            if len(key) != 64 or set(key) - set("0123456789abcdef"):
                raise UserError(f"--keys has {key[:8]!r}...: give the SHA-256 of the key, 64 hex digits, not the key")

    def _check_replicas(self) -> None:
        for name in ("replicas", "drain_s", "scale_down_s"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give 0 or more")
        if self.max_replicas is not None and self.max_replicas < max(1, self.replicas):
            raise UserError(f"--max-replicas is {self.max_replicas}: give at least {max(1, self.replicas)}")

    @property
    def most_replicas(self) -> int:
        """Replicas of a version at most."""
        return max(1, self.replicas, self.max_replicas or 0)

    @property
    def proxied(self) -> bool:
        """Whether players come through Ray Serve's proxies: gateways of a cluster are on any of its nodes."""
        return self.proxy or self.cluster.address != "local"

    @property
    def worlds(self) -> tuple[str, ...]:
        """Every reference to serve, the default first."""
        return (self.world,) if isinstance(self.world, str) else tuple(self.world)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the port."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Synthetic players against a running server, each with a session of its own."""

    url: str = "http://127.0.0.1:8000"
    """Address of the server."""
    sessions: int = 8
    """Players at once."""
    steps: int = 100
    """Steps of each."""
    rate_fps: float = 10.0
    """Steps a second that each player wants; 0 for as fast as it goes."""
    key: str | None = None
    """API key, where the server asks for one."""
    seed: int = 0
    """Of actions and sessions."""

    def __post_init__(self) -> None:
        for name in ("sessions", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}: give at least 1")
        if self.rate_fps < 0:
            raise UserError(f"--rate-fps is {self.rate_fps}: give a rate, or 0 for as fast as it goes")


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Every session there is or was, as JSON lines: owner, model, seed, prompt digest, actions, when."""

    home: Path = Path("lampworks-home")
    """Folder of the session journal."""
    store: str | None = None
    """Session journal, as of `lampworks serve`."""


@dataclass(frozen=True, kw_only=True)
class PlayConfig:
    """A session in this terminal."""

    url: str = "http://127.0.0.1:8000"
    """Address of the server."""
    picture: Path | None = None
    """First frame; the server's first gallery picture by default."""
    seed: int | None = None
    """Same seed, picture and actions: same frames. Random by default."""
    model: str | None = None
    """World to play; the server's default when left out."""
    key: str | None = None
    """API key, where the server asks for one."""
