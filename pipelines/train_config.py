"""What a user may set in training. Field docstrings are the command line's help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from infra.config import ClusterConfig, TrackingConfig, UserError, within
from models.config import PolicyConfig, QualityConfig, WorldConfig

STAGES = ("tokenizer", "actions", "dynamics", "world", "distilled", "policy", "quality")


@dataclass(frozen=True, kw_only=True)
class FeedConfig:
    """How clips become batches. The order of samples is a function of the seed and the sample's number alone."""

    windows_per_clip: int = 8
    """Windows cut from a clip each time it is decoded."""
    clips_per_group: int = 64
    """Clips whose windows are shuffled together; a reader keeps about as many decoded."""
    cache_bytes: int = 512 * 2**20
    """Decoded clips that each reader keeps."""
    readers: int = 1
    """Reading actors beside the trainers; more when `data wait` grows."""
    avoid_cuts: bool = True
    """Keep windows off scene cuts where a clip has room for that."""

    def __post_init__(self) -> None:
        within("--feed.windows-per-clip", self.windows_per_clip, 1, 100_000)
        within("--feed.clips-per-group", self.clips_per_group, 1, 1_000_000)
        within("--feed.readers", self.readers, 1, 10_000)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule; the paper's values (tables 6 and 8) by default, at a laptop's learning rate."""

    lr: float = 3e-4
    """Highest learning rate."""
    final_lr: float = 3e-5
    """Where cosine and wsd end."""
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    """After the warm-up. constant: flat; cosine: down to final_lr; wsd: flat, then linear down over decay_share."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_share: float = 0.2
    """Share of the steps that wsd's decay takes."""
    betas: tuple[float, float] = (0.9, 0.9)
    """Of AdamW's moving averages."""
    weight_decay: float = 1e-4
    """On matrices only: not on gains, biases and codebooks."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    ema_decay: float = 0.0
    """Averages the weights over about 1 / (1 - decay) steps and publishes the average; 0 publishes the last ones."""

    def __post_init__(self) -> None:
        within("--optimizer.lr", self.lr, 0, 1)
        within("--optimizer.final-lr", self.final_lr, 0, self.lr)
        within("--optimizer.decay-share", self.decay_share, 0, 1)
        within("--optimizer.ema-decay", self.ema_decay, 0, 0.999999)
        within("--optimizer.clip-norm", self.clip_norm, 0, 1e9)


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """Which checkpoints stay on disk."""

    last: int = 2
    """The newest ones; at least 2, so that a damaged one has a predecessor."""
    every: int = 0
    """Also each one whose step is a multiple of this; 0 for none."""
    best: bool = False
    """Also the one with the lowest loss (mean over the steps since the checkpoint before)."""
    to: str | None = None
    """Where: `s3://bucket/prefix` (`?endpoint_override=host:port&scheme=http`), `gs://`, a shared folder; None is the
    training's own folder."""
    background: bool = True
    """Steps go on while a copy of the state is written; off, they wait."""

    def __post_init__(self) -> None:
        within("--keep.last", self.last, 2, 1_000_000)
        within("--keep.every", self.every, 0, 1e9)
        if self.to is not None and "://" not in self.to:  # workers stand in other folders
            object.__setattr__(self, "to", str(Path(self.to).expanduser().resolve()))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Trains one stage of a world. The same command again continues where it stopped, or finds it done."""

    home: Path = Path("lampworks-home")
    """Folder that everything is written under; a cluster's must be shared by its nodes."""
    stage: Literal["tokenizer", "actions", "dynamics", "world", "distilled", "policy", "quality"] = "tokenizer"
    """tokenizer; actions: the latent action model; dynamics: with finished actions; world: actions and dynamics;
    distilled: a finished world that draws in few steps; policy: a player that learns from finished actions by watching;
    quality: the classifier of clips, from what people rated."""
    name: str | None = None
    """Name of the artifact; None takes the stage's."""
    dataset: str = "platformers"
    """The dataset, as `name` (its newest version) or `name@version`."""
    tokenizer: str | None = None
    """Tokenizer artifact for dynamics and world; None takes `tokenizer`."""
    actions: str | None = None
    """Latent action artifact for dynamics and policy, which also takes a world; None takes `actions`."""
    teacher: str | None = None
    """World artifact that distilled learns from; None takes `world`."""
    few_steps: int = 4
    """Refinement passes that distilled learns to draw in."""
    teacher_steps: int = 25
    """Refinement passes that its teacher draws in."""
    model: WorldConfig = field(default_factory=WorldConfig)
    """The world's settings; a stage uses its part, and takes finished parts from their artifacts."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The policy's settings; pictures and actions are as its latent actions have them."""
    quality: QualityConfig = field(default_factory=QualityConfig)
    """The quality classifier's settings."""
    label_holdout: float = 0.25
    """Share of the labelled videos that the quality classifier is measured on and never learns from."""
    steps: int = 4000
    """Optimizer steps."""
    batch: int = 16
    """Samples (windows) of one step over all workers."""
    micro_batch: int = 8
    """Samples a worker holds at once; batch / micro_batch / workers micro-batches are accumulated."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW, its schedule, clipping and averaging."""
    feed: FeedConfig = field(default_factory=FeedConfig)
    """How clips become batches."""
    zero: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: what is sharded over the workers: 1 optimizer states, 2 and gradients, 3 and parameters."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes in bfloat16 and keeps weights, sums and optimizer states in fp32."""
    offload: bool = False
    """Keep optimizer states, and with --zero 3 the parameters, in host memory (on GPUs)."""
    tensor: int = 1
    """Workers that share each block's matrices (tensor parallelism); they take the same samples."""
    workers: int = 2
    """Training processes; 0 runs the same steps in this process, without Ray."""
    min_workers: int | None = None
    """Go on with as few as this many when nodes are lost; None waits for all of them."""
    gpu: bool = False
    """One GPU per worker."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    keep: KeepConfig = field(default_factory=KeepConfig)
    """Which checkpoints stay."""
    picture_every: int = 500
    """Steps between pictures (reconstructions, or one row per latent action); 0 for none."""
    log_every: int = 20
    """Steps between progress lines and tracked metrics."""
    max_failures: int = 3
    """Worker losses that one command survives."""
    hang_s: float = 300.0
    """Workers that wait for each other longer than this are taken as hung and started again."""
    skip_budget: int = 20
    """Steps that may be left out (not finite, or spikes); past it, back to a checkpoint before them, around them."""
    spike_factor: float = 0.0
    """Leave out steps whose loss or gradient norm is this many times the median of the last 64; 0 takes them all."""
    seed: int = 0
    """Order of samples, initial weights and every random draw follow from it."""
    dry_run: bool = False
    """Only say what it would take: memory by ZeRO stage, operations, hours on `device`."""
    device: Literal["h200", "h100", "a100"] = "h200"
    """What a dry run with --gpu reckons with."""
    mfu: float = 0.4
    """Share of the device's peak that a dry run reckons with."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """The MLflow server; the home's embedded store by default."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The Ray cluster to run on."""

    def __post_init__(self) -> None:
        within("--mfu", self.mfu, 0.01, 1)
        within("--label-holdout", self.label_holdout, 0.01, 0.9)
        within("--steps", self.steps, 1, 1e9)
        within("--workers", self.workers, 0, 100_000)
        within("--micro-batch", self.micro_batch, 1, self.batch)
        within("--checkpoint-every", self.checkpoint_every, 1, 1e9)
        within("--log-every", self.log_every, 1, 1e9)
        within("--hang-s", self.hang_s, 1, 1e6)
        within("--skip-budget", self.skip_budget, 0, 1e9)
        within("--spike-factor", self.spike_factor or 2, 1, 1e9)
        within("--few-steps", self.few_steps, 1, self.teacher_steps - 1)
        if self.stage not in STAGES:
            raise UserError(f"--stage is {self.stage!r}: it must be one of {', '.join(STAGES)}")
        within("--tensor", self.tensor, 1, max(1, self.workers))
        if self.tensor > 1:
            self._check_tensor()
        self._check_batch()
        if self.zero == 0 and self.offload:
            raise UserError("--offload has nothing to move with --zero 0: use --zero 1, 2 or 3")
        if self.zero == 0 and self.precision == "bf16":
            raise UserError("--zero 0 with --precision bf16 trains wrongly in DeepSpeed 0.19: use --zero 1")
        if self.zero == 3 and self.optimizer.ema_decay:
            raise UserError("--optimizer.ema-decay needs whole weights, --zero 3 shards them: use --zero 2")

    def _check_batch(self) -> None:
        for workers in {self.workers or 1, self.min_workers or self.workers or 1}:
            if self.batch % (unit := self.micro_batch * (workers // self.tensor)):
                groups = f"{workers} workers" if self.tensor == 1 else f"{workers // self.tensor} groups of workers"
                raise UserError(
                    f"--batch {self.batch} is not a multiple of --micro-batch {self.micro_batch} x {groups}: "
                    f"change one of them, for example --batch {-(-self.batch // unit) * unit}"
                )

    def _check_tensor(self) -> None:
        given = f"--tensor {self.tensor}"
        if self.workers % self.tensor:
            raise UserError(f"{given} does not divide {self.workers} workers: change --workers")
        if self.zero not in (1, 2):
            raise UserError(f"{given} goes with --zero 1 or 2, not {self.zero}")
        if self.stage in ("distilled", "quality"):
            raise UserError(f"{given} is not for the stage {self.stage}: leave it out")
        if self.min_workers or self.optimizer.ema_decay:
            other = "--min-workers" if self.min_workers else "--optimizer.ema-decay"
            raise UserError(f"{given} does not go with {other}: leave one of them out")

    @property
    def artifact_name(self) -> str:
        """Name under which the result is published."""
        return self.name or self.stage
