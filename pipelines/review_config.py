"""What a user may set when looking at footage: rating clips, replaying a video. Field docstrings are the CLI's help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infra.config import UserError, within
from pipelines.config import CurateConfig


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Serves a page on this machine for rating clips 1 to 5, which the quality classifier learns from."""

    dataset: str = "platformers"
    """The dataset, as `name` (its newest version) or `name@version`."""
    home: Path = Path("lampworks-home")
    """The home that holds it."""
    port: int = 8001
    """Port of the page; 0 takes a free one."""

    def __post_init__(self) -> None:
        within("--port", self.port, 0, 65535)


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(CurateConfig):
    """Takes one video through curation in the foreground and shows each decision; the dataset stays as it is."""

    video: str = ""
    """Id, file name or path of the video."""
    stage: Literal["rules", "decode", "clips", "copies"] = "copies"
    """The last stage to go through: rules on metadata, decoding, clips by their signals, copies in the dataset."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.video:
            raise UserError("name a video: `lampworks replay VIDEO`")
