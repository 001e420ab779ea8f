"""The worlds that a gateway offers: which versions there are, and which one a new session gets and then keeps."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from models.config import DynamicsConfig, TokenizerConfig, config_from_dict
from serving.protocol import Model, ModelInfo, Problem


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a new session of a name gets: the champion, or for a share of the sessions the candidate."""

    champion: str
    """A reference, `name@version`."""
    candidate: str | None = None
    share: float = 0.0
    """Fraction of new sessions that get the candidate."""

    def pick(self, session_id: str) -> str:
        """The reference for a session; a function of its id, so that asking again gives the same."""
        drawn = int.from_bytes(hashlib.sha256(session_id.encode()).digest()[:8]) / 2**64
        return self.candidate if self.candidate and drawn < self.share else self.champion

    @property
    def references(self) -> list[str]:
        """The versions that new sessions may get."""
        return [self.champion, *([self.candidate] if self.candidate else [])]


class Worlds:
    """Models by reference, their prompt pictures, and what the names mean that clients give.

    Args:
        models: worlds by reference, the default first.
        galleries: for each reference a folder of prompt pictures.
        choices: what each name stands for; by default the first reference with that name.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        galleries: Mapping[str, Path],
        choices: Mapping[str, Choice] | None = None,
    ) -> None:
        self._models, self._galleries = dict(models), {ref: _gallery(folder) for ref, folder in galleries.items()}
        first = {ref.partition("@")[0]: ref for ref in reversed(self._models)}
        names = dict.fromkeys(ref.partition("@")[0] for ref in self._models)
        self.choices = choices or {name: Choice(champion=first[name]) for name in names}

    def __getitem__(self, reference: str) -> Model:
        return self._models[reference]

    def __contains__(self, reference: str) -> bool:
        return reference in self._models

    def add(self, reference: str, model: Model, gallery: Path) -> None:
        """Puts a version in, or another model in its place."""
        self._models[reference], self._galleries[reference] = model, _gallery(gallery)

    @property
    def alive(self) -> bool:
        """Whether every model that runs in this process does."""
        return all(getattr(model, "alive", True) for model in self._models.values())

    @property
    def offered(self) -> list[str]:
        """The versions that new sessions may get, the default first."""
        champions = [choice.champion for choice in self.choices.values()]
        return list(dict.fromkeys([*champions, *(r for c in self.choices.values() for r in c.references)]))

    def gallery(self, reference: str) -> Mapping[str, Path]:
        """Prompt pictures by id; a client can only name what is listed here."""
        return self._galleries.get(reference, {})

    def aliases(self, reference: str) -> list[str]:
        """What a version is to its name: champion, candidate, or nothing any more."""
        held = {("champion", c.champion) for c in self.choices.values()}
        held |= {("candidate", c.candidate) for c in self.choices.values() if c.candidate}
        return sorted(alias for alias, holder in held if holder == reference)

    def choose(self, name: object, session_id: str) -> str:
        """The reference for a new session.

        Args:
            name: what the client asked for: `NAME`, `NAME@champion`, `NAME@candidate`, `NAME@v3`, `NAME@3`, or nothing
                for the default.
            session_id: a canary's share is drawn from it.

        Raises:
            Problem: 404, it is not offered.
        """
        if name in (None, ""):
            return next(iter(self.choices.values())).pick(session_id)
        if (choice := self.choices.get(str(name))) is not None:
            return choice.pick(session_id)
        base, _, wanted = str(name).partition("@")
        choices = [c for n, c in self.choices.items() if n.partition("@")[0] == base]
        found = next((r for c in choices for r in _versions(c, wanted)), None)
        if found is None:
            raise Problem(
                404, "no-such-model", f"{str(name)[:80]!r} is not served: {', '.join([*self.choices, *self.offered])}"
            )
        return found


def card(reference: str, path: Path) -> ModelInfo:
    """What players need to know of a published world, from its files alone."""
    tokenizer = config_from_dict(TokenizerConfig, json.loads((path / "tokenizer/config.json").read_text())["config"])
    dynamics = config_from_dict(DynamicsConfig, json.loads((path / "dynamics/config.json").read_text())["config"])
    return ModelInfo(
        reference=reference,
        actions=dynamics.actions,
        height_px=tokenizer.height_px,
        width_px=tokenizer.width_px,
        fps=float(json.loads((path / "world.json").read_text())["fps"]),
        prompt_frames=dynamics.frames,
        words=dynamics.words,
    )


def _versions(choice: Choice, wanted: str) -> Iterable[str]:
    """Those of a choice's versions that are meant by an alias or a number."""
    if wanted == "champion":
        yield choice.champion
    for reference in choice.references:
        version = reference.partition("@")[2]
        if wanted in (version, version.removeprefix("v")) or (wanted == "candidate" and reference == choice.candidate):
            yield reference


def _gallery(folder: Path) -> dict[str, Path]:
    return {p.stem: p for p in sorted(folder.glob("*.png"))}
