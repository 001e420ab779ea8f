"""What a user may set in the batch pipelines. Field docstrings are the command line's help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from infra.config import ClusterConfig, TrackingConfig, UserError, within
from models.config import SamplerConfig
from pipelines.train_config import TrainConfig

# -- record ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """Plays procedurally generated games and writes ordinary video files with sidecars."""

    home: Path = Path("lampworks-home")
    """Folder that everything is written under; videos go to its `raw/`."""
    game: str = "coinrun"
    """The game most episodes are played in."""
    episodes: int = 60
    """Episodes of the main game."""
    side_games: tuple[str, ...] = ("jumper", "ninja", "climber")
    """Other platformers of the same collection."""
    side_episodes: int = 1
    """Episodes of each side game."""
    min_s: float = 32.0
    """Shortest episode, in seconds of video."""
    max_s: float = 64.0
    """Longest episode, in seconds of video."""
    steps_per_second: int = 20
    """Game steps in a second of video; every 0.1 s shows an exact state of the game."""
    rates_fps: tuple[int, ...] = (20, 30, 60)
    """Frame rates the files are written at, drawn per episode."""
    scales: tuple[int, ...] = (2, 3, 4)
    """Whole factors the 64-pixel screen is enlarged by, as emulator windows do; drawn per episode."""
    crf: int = 18
    """x264 quality of the source videos (lower is better)."""
    distribution_mode: Literal["easy", "hard"] = "easy"
    """Difficulty of the generated levels."""
    use_backgrounds: bool = True
    """Painted backgrounds; without them the screen is plainer and learns faster."""
    restrict_themes: bool = False
    """One theme of walls and characters instead of many."""
    max_hold: int = 8
    """Longest time an action is held, in tenths of a second; the length is drawn from 1 to this."""
    unwanted: bool = True
    """Also write what curation must refuse: static, wrong title, broken, truncated, a copy, no sidecar."""
    workers: int = 2
    """Processes that play and encode."""
    seed: int = 0
    """Everything drawn follows from it."""

    def __post_init__(self) -> None:
        within("--episodes", self.episodes, 0, 1_000_000)
        within("--side-episodes", self.side_episodes, 0, 1_000_000)
        within("--min-s", self.min_s, 1, 36_000)
        within("--max-s", self.max_s, self.min_s, 36_000)
        within("--steps-per-second", self.steps_per_second, 10, 240)
        within("--max-hold", self.max_hold, 1, 600)
        within("--workers", self.workers, 1, 256)
        within("--crf", self.crf, 0, 51)
        if self.steps_per_second % 10:
            raise UserError(f"--steps-per-second is {self.steps_per_second}: give a multiple of 10")
        if not self.rates_fps or any(rate % 10 or rate <= 0 for rate in self.rates_fps):
            raise UserError(f"--rates-fps is {self.rates_fps}: give positive multiples of 10")
        if not self.scales or min(self.scales) < 1:
            raise UserError(f"--scales is {self.scales}: give whole factors of at least 1")


# -- curate ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RulesConfig:
    """Which titles are wanted: the paper's rule (Genie, section 3) by default. Words match whole, in any case."""

    file: Path | None = None
    """A TOML file with these keys instead of the shipped word lists (see docs/data.md)."""
    require_sidecar: bool = True
    """A video without a readable `.info.json` is rejected, with that reason."""
    min_duration_s: float = 16.0
    """Shorter videos (by their sidecar) are rejected."""
    max_duration_s: float = 12 * 3600.0
    """Longer videos (by their sidecar) are rejected."""
    min_side_px: int = 120
    """Videos with a shorter side below this (by their sidecar) are rejected."""
    max_side_px: int = 4320
    """Videos with a shorter side above this are rejected: decoding 1080p costs seven times as much as 360p."""
    blocked_uploaders: tuple[str, ...] = ()
    """Uploaders whose videos are never taken."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Thresholds on measured signals. None of them changes what is measured, so a new value decodes nothing again."""

    max_static_share: float = 0.8
    """Share of frames in which under 0.2% of the pixels change: above it the clip is static, a desktop."""
    max_slides: int = 1
    """Cuts that a static clip may have; with more it is called a slideshow."""
    max_black_share: float = 0.5
    """Share of blank frames (hardly any contrast; dark games have it) a clip may have."""
    min_blur: float = 20.0
    """Least variance of the Laplacian (median over the clip); lower is blurred."""
    max_held_share: float = 0.6
    """Share of 10 FPS slots without a new source frame: above it the source has too few frames."""
    max_gap_s: float = 2.0
    """Longest time without any source frame within a clip."""
    max_cuts: int = 12
    """Cuts within a clip. Deaths and respawns look like cuts, so only many refuse a clip."""
    max_corrupt_share: float = 0.02
    """Share of source frames that the decoder marked damaged."""
    min_shape: float = 0.8
    """Least width of the shown picture (turned, without bars) for each pixel of its height; below it is portrait."""
    min_quality: float = 0.0
    """Least probability of good gameplay, as the classifier of `--quality` says; clips without a score are kept."""
    max_copied_share: float = 0.5
    """Share of a clip that clips of better copies (larger picture, then more bits) show too; 1 keeps every copy."""

    def __post_init__(self) -> None:
        shares = ("max_static_share", "max_black_share", "max_held_share", "max_corrupt_share", "max_copied_share")
        for name in (*shares, "min_quality"):
            within(f"--filters.{name.replace('_', '-')}", getattr(self, name), 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How a worker gets a video that lies elsewhere."""

    retries: int = 5
    """How often an error that passes (no answer, too busy) is tried again; the pauses grow from 0.5 to 30 seconds."""
    timeout_s: float = 3600.0
    """Longest time for one video."""
    max_bytes: int = 64 * 2**30
    """Largest video. A worker keeps one at a time on its disk."""
    scratch: Path | None = None
    """Folder for it; None is the system's temporary folder."""

    def __post_init__(self) -> None:
        within("--fetch.retries", self.retries, 0, 100)
        within("--fetch.timeout-s", self.timeout_s, 1, 1e6)


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """Turns a folder of source videos into clip shards of a versioned dataset."""

    source: str | Path | None = None
    """Folder of videos with `.info.json` sidecars, here or at `s3://` or `gs://`; a manifest (.parquet, .csv, .jsonl);
    one `http(s)://` video. None is the home's `raw/`."""
    home: Path = Path("lampworks-home")
    """Folder that everything is written under; the dataset goes to `datasets/<name>`."""
    target: str | None = None
    """Folder for datasets instead of the home's, such as `s3://bucket/datasets`."""
    name: str = "platformers"
    """The dataset's name."""
    width_px: int = 160
    """Width of the clips."""
    height_px: int = 90
    """Height of the clips."""
    fps: int = 10
    """Frames per second of the clips."""
    clip_frames: int = 160
    """Frames in a clip."""
    aspect: Literal["pad", "crop", "stretch"] = "pad"
    """What to do with another shape: black bars, cut the edges, or stretch."""
    crop_bars: bool = True
    """Cut off black bars that a whole video has on opposite sides, before it is brought into shape."""
    codec: Literal["h264_444", "h264_420", "jpeg444", "raw_zstd"] = "h264_444"
    """How clips are stored; 4:2:0 saves 9% and caps quality at about 35 dB at this size. docs/data.md compares them."""
    crf: int = 15
    """x264 quality of the clips (lower is better)."""
    rules: RulesConfig = field(default_factory=RulesConfig)
    """Which videos are wanted, by their metadata."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Which clips are kept, by what is seen."""
    quality: str | None = None
    """Classifier (`name` or `name@version`, see `lampworks label`) that scores clips for `--filters.min-quality`."""
    quality_gpus: float = 0.0
    """GPUs (a share, such as 0.25) for each worker that scores; 0 scores on CPUs."""
    fetch: FetchConfig = field(default_factory=FetchConfig)
    """How videos that lie elsewhere are fetched."""
    retry: tuple[str, ...] = ()
    """Take dead letters with these reasons once more, such as `unreachable` after an outage."""
    holdout_share: float = 0.1
    """Share of videos in the `test` split, by a hash of the video's id: stable when videos are added."""
    unit_s: float = 3600.0
    """Most source seconds in a work unit (one shard file); small sources get smaller units, at least sixteen."""
    part_s: float = 3600.0
    """Longest piece of a video that one unit works on; longer videos are cut into parts with a ledger row each."""
    timeout_s: float = 120.0
    """Most CPU time on one video, and longest time without any, before it becomes a dead letter."""
    timeout_factor: float = 2.0
    """Seconds allowed for each second of video on top of `timeout_s`."""
    memory_bytes: int = 2 * 2**30
    """Address space that the decoding child may add; more makes the video a dead letter."""
    previews: int = 50
    """How many videos that were refused by their metadata alone get a picture strip for the report."""
    workers: int | None = None
    """Most curating processes; None takes the cluster's cores."""
    min_workers: int | None = None
    """Fewest, on a cluster that grows and shrinks: Ray Data scales between the two; None is as many as the most."""
    units_in_flight: int = 2
    """Units given to a process ahead, the one at work included."""
    backpressure_ratio: float | None = None
    """Ray Data's `downstream_capacity_backpressure_ratio`; None leaves it as Ray has it."""
    dry_run: bool = False
    """Print the settings, the work and its estimated cost, and stop."""
    explain: str | None = None
    """Print every rule's verdict on this video (id or file name) and its ledger row, and stop."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The Ray cluster to run on."""

    def __post_init__(self) -> None:
        within("--quality-gpus", self.quality_gpus, 0, 8)
        if self.filters.min_quality and not self.quality:
            raise UserError("--filters.min-quality needs scores: name a classifier with --quality, or leave it out")
        within("--width-px", self.width_px, 16, 4096)
        within("--height-px", self.height_px, 16, 4096)
        within("--fps", self.fps, 1, 60)
        within("--clip-frames", self.clip_frames, 2, 100_000)
        within("--crf", self.crf, 0, 51)
        within("--holdout-share", self.holdout_share, 0.0, 1.0)
        within("--unit-s", self.unit_s, 1, 1e6)
        within("--timeout-s", self.timeout_s, 0.1, 1e6)
        within("--part-s", self.part_s, self.clip_frames / self.fps, 1e6)
        within("--units-in-flight", self.units_in_flight, 1, 100)
        within("--workers", self.workers or 1, 1, 100_000)
        within("--min-workers", self.min_workers or 1, 1, self.workers or 100_000)
        if self.width_px % 2 or self.height_px % 2:
            raise UserError(f"--width-px {self.width_px} --height-px {self.height_px}: give even numbers")
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name) or self.name.startswith("."):
            raise UserError(f"--name is {self.name!r}: use letters, digits, dot, dash and underscore")


@dataclass(frozen=True, kw_only=True)
class ForgetConfig:
    """Removes a video's or an uploader's footage from a dataset, older versions included: for takedown requests."""

    name: str
    """The dataset."""
    home: Path = Path("lampworks-home")
    """The home that holds it."""
    video: str | None = None
    """Id of the video."""
    uploader: str | None = None
    """All videos of this uploader."""

    def __post_init__(self) -> None:
        if (self.video is None) == (self.uploader is None):
            raise UserError("give either --video or --uploader")


# -- evaluate and report -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measures a world on clips that no training saw."""

    home: Path = Path("lampworks-home")
    """Folder that everything is written under."""
    world: str = "world"
    """The world to measure, `name` or `name@version`."""
    dataset: str | None = None
    """Dataset with the held-out clips, `name@version`; None is the one that the world learned from."""
    clips: int = 128
    """Held-out windows to measure on. More give narrower intervals and take longer."""
    prompts: int = 8
    """Frames from which every action is held, to see what it does."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of refinement steps to compare; none compares none."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(steps=8))
    """How frames are drawn."""
    batch: int = 64
    """Windows, and rollouts, at a time; memory grows with it, results do not depend on it."""
    device: str = "cpu"
    """Device to compute on, such as cpu or cuda."""
    seed: int = 0
    """Of the chosen windows, the permuted actions, the sampler's noise and the bootstrap."""

    def __post_init__(self) -> None:
        within("--clips", self.clips, 2, 1_000_000)
        within("--prompts", self.prompts, 1, 10_000)
        within("--steps", min(self.steps, default=1), 1, 10_000)
        within("--batch", self.batch, 1, 100_000)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Writes one self-contained HTML page about a world: data, training, measures, lineage."""

    home: Path = Path("lampworks-home")
    """Folder that everything is written under; the page goes to its `reports/`."""
    evaluation: str = "world-evaluation"
    """The evaluation to report, or a dataset, for its curation: `name` or `name@version`; artifacts come first."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the training curves are."""
    pictures: int = 24
    """Most pictures on a contact sheet of clips or videos."""

    def __post_init__(self) -> None:
        within("--pictures", self.pictures, 1, 1000)


# -- tokenize ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Turns the clips of a dataset into token shards beside them."""

    home: Path = Path("lampworks-home")
    """Folder that everything is written under."""
    dataset: str = "platformers"
    """The dataset, as `name` (its newest version) or `name@version`."""
    tokenizer: str = "tokenizer"
    """The tokenizer artifact, as `name` or `name@version`."""
    workers: int = 1
    """Model replicas, each with one CPU (or one GPU, see `gpus_per_worker`)."""
    gpus_per_worker: float = 0.0
    """GPUs for each replica; 0 encodes on the CPU."""
    clips_per_shard: int = 64
    """Clips in one token file; one file is one piece of work that commits on its own."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The Ray cluster to run on."""

    def __post_init__(self) -> None:
        within("--workers", self.workers, 1, 100_000)
        within("--gpus-per-worker", self.gpus_per_worker, 0, 8)
        within("--clips-per-shard", self.clips_per_shard, 1, 1_000_000)


# -- the path ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    """The whole path from games to a report: one setting for each step. References between steps are filled in."""

    home: Path = Path("lampworks-home")
    """Folder that everything is written under; it replaces the steps' own."""
    record: RecordConfig = field(default_factory=RecordConfig)
    """Gameplay videos."""
    curate: CurateConfig = field(default_factory=CurateConfig)
    """Videos -> clips."""
    tokenizer: TrainConfig = field(default_factory=lambda: TrainConfig(stage="tokenizer"))
    """Clips -> the video tokenizer."""
    tokenize: TokenizeConfig = field(default_factory=TokenizeConfig)
    """Clips -> tokens."""
    world: TrainConfig = field(default_factory=lambda: TrainConfig(stage="world"))
    """Clips and tokens -> latent actions and dynamics, co-trained."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """The world, measured on held-out clips."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """One page about it all."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The Ray cluster that all steps share."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Records gameplay, curates it, trains a small world on it, measures it, and serves it to a browser."""

    home: Path = Path("lampworks-home")
    """Folder that everything is written under. The same folder again continues, or reuses what is done."""
    browser: bool = True
    """Serve until Ctrl-C and open the page; --no-browser plays one scripted session instead and ends."""
    port: int = 8000
    """Port of the page; 0 takes a free one."""
    size: Literal["demo", "tiny"] = "demo"
    """demo: learns to be played, about 17 minutes; tiny: the same steps in a minute or two, to see that all works."""
