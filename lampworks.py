"""The front door: `lampworks COMMAND`, in the order of the data path. Imports lazily; imported by nobody."""

import difflib
import importlib
import json
import logging
import os
import sys
import tomllib
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = "0.1.0"


@dataclass(frozen=True)
class Command:
    """A word a user types: what it does, its configuration, the function that does it, and flags that need no name."""

    help: str
    config: str
    run: str
    positional: tuple[str, ...] = ()


COMMANDS = {
    "demo": Command(
        "the whole path on recorded gameplay; ends with a playable page", "pipelines.config:DemoConfig", ":demo"
    ),
    "record": Command("play games and write videos", "pipelines.config:RecordConfig", "pipelines.gameplay:record"),
    "curate": Command(
        "[SOURCE]: videos -> clip shards", "pipelines.config:CurateConfig", "pipelines.curate:command", ("--source",)
    ),
    "replay": Command(
        "VIDEO: one video through curation, each decision shown",
        "pipelines.review_config:ReplayConfig",
        "pipelines.replay:replay",
        ("--video",),
    ),
    "label": Command(
        "[DATASET]: rate clips by hand for the quality classifier",
        "pipelines.review_config:LabelConfig",
        "pipelines.label:label",
        ("--dataset",),
    ),
    "train": Command(
        "STAGE: tokenizer | actions | dynamics | world | quality",
        "pipelines.train_config:TrainConfig",
        "pipelines.train:command",
        ("--stage",),
    ),
    "sweep": Command(
        "STAGE: several sizes and batches, a power law, what a budget is best spent on",
        "pipelines.sweep_config:SweepConfig",
        "pipelines.sweep:command",
        ("--train.stage",),
    ),
    "tokenize": Command(
        "[DATASET TOKENIZER]: clips -> token shards",
        "pipelines.config:TokenizeConfig",
        "pipelines.tokenize:tokenize",
        ("--dataset", "--tokenizer"),
    ),
    "evaluate": Command(
        "[WORLD]: measure it on held-out clips",
        "pipelines.config:EvaluateConfig",
        "pipelines.evaluate:evaluate",
        ("--world",),
    ),
    "report": Command(
        "[EVALUATION | DATASET]: one HTML page of it all",
        "pipelines.config:ReportConfig",
        "pipelines.report:report",
        ("--evaluation",),
    ),
    "promote": Command(
        "NAME@VERSION [ALIAS]: make it the champion that is served",
        "infra.config:PromoteConfig",
        ":promote",
        ("--reference", "--alias"),
    ),  # fmt: skip
    "serve": Command("[WORLD]: host it for players", "serving.config:ServeConfig", ":serve", ("--world",)),
    "audit": Command("every session there is or was, as JSON lines", "serving.config:AuditConfig", ":audit"),
    "play": Command("a session in this terminal", "serving.config:PlayConfig", "serving.terminal:play", ("--url",)),
    "bench": Command(
        "synthetic players against a running server", "serving.config:BenchConfig", "serving.bench:bench", ("--url",)
    ),
    "show": Command(
        "[NAME | preset NAME]: datasets, artifacts, lineage", "infra.config:ShowConfig", ":show", ("--what", "--name")
    ),
    "forget": Command(
        "[NAME]: remove a video's or an uploader's footage",
        "pipelines.config:ForgetConfig",
        "pipelines.revise:forget",
        ("--name",),
    ),
    "doctor": Command("check this machine, say the fix", "infra.config:DoctorConfig", ":doctor"),
}

OWN_OUTPUT = {"demo", "record", "promote", "serve", "audit", "play", "bench", "show", "doctor"}
"""The other commands end with one line on stdout for scripts: the reference or path of what they made."""

USAGE = """usage: lampworks COMMAND [--config FILE.toml] [--preset NAME] [options]

{commands}

`lampworks COMMAND --help` lists a command's options. Everything is written under --home (./lampworks-home).
LAMPWORKS_TRACEBACK=1 shows where an error came from."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; a user's error is one sentence on stderr and exit code 2.

    Raises:
        SystemExit: always with the exit code, unless the command ends well.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in {"-h", "--help", "help"}:
        lines = (f"  {name:9} {command.help}" for name, command in COMMANDS.items())
        sys.stdout.write(USAGE.format(commands="\n".join(lines)) + "\n")
        return
    if words[0] == "--version":
        sys.stdout.write(f"lampworks {VERSION}\n")
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        _run(words[0], words[1:])
    except KeyboardInterrupt:
        sys.exit("lampworks: stopped; the same command continues where this one was")
    except ValueError as error:
        if not _is_for_users(error) or os.environ.get("LAMPWORKS_TRACEBACK"):
            raise
        sys.stderr.write(f"lampworks: {error}\n")
        sys.exit(2)


def _is_for_users(error: ValueError) -> bool:
    from infra.config import UserError
    from models.config import ModelError

    return isinstance(error, UserError | ModelError)


def _run(name: str, words: list[str]) -> None:
    from infra.config import UserError

    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(COMMANDS)}"
        raise UserError(f"no command {name!r}: {hint}")
    config = read_config(_load(command.config), name, words)
    result = _load_function(command.run)(config)
    if name not in OWN_OUTPUT:
        sys.stdout.write(f"{getattr(result, 'reference', result)}\n")


def _load_function(name: str) -> Any:
    """Imported only now: a wrong option is refused before torch and Ray are loaded."""
    return _load(name)


def _load(name: str) -> Any:
    """The object that "module:name" names; ":name" is one of this file."""
    module, _, attribute = name.partition(":")
    return globals()[attribute] if not module else getattr(importlib.import_module(module), attribute)


def read_config(cls: type, name: str, words: list[str]) -> Any:
    """The command's configuration: class defaults, then --preset, then --config TOML, then options.

    Raises:
        UserError: a preset or key that does not exist, a file that can't be read.
    """
    import tyro

    from infra.config import from_dict, to_dict

    words = _named(words, COMMANDS[name].positional)
    words, preset = _take(words, "--preset")
    words, file = _take(words, "--config")
    default = _preset(name, preset) if preset else None
    if file:
        base = to_dict(default) if default is not None else {}
        default = from_dict(cls, _overlay(base, _read_toml(Path(file))))
    description = f"{COMMANDS[name].help[0].upper()}{COMMANDS[name].help[1:]}.\n\n{(cls.__doc__ or '').strip()}"
    return tyro.cli(cls, prog=f"lampworks {name}", description=description, args=words, default=default)


def _named(words: list[str], flags: Sequence[str]) -> list[str]:
    """Puts their flags before the leading words that have none: `train tokenizer` is `train --stage tokenizer`."""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    pairs = zip(flags, words[:count], strict=False)
    return [part for pair in pairs for part in pair] + words[min(count, len(flags)) :]


def _take(words: list[str], flag: str) -> tuple[list[str], str | None]:
    """Removes `flag VALUE` or `flag=VALUE` from the words."""
    for index, word in enumerate(words):
        if word.startswith(flag + "="):
            return words[:index] + words[index + 1 :], word[len(flag) + 1 :]
        if word == flag and index + 1 < len(words):
            return words[:index] + words[index + 2 :], words[index + 1]
    return words, None


def _preset(command: str, name: str) -> Any:
    from infra.config import UserError
    from pipelines import presets

    known = presets.COMMAND_PRESETS.get(command, {})
    if name not in known:
        raise UserError(f"no preset {name!r} for {command}: there are {', '.join(known) or 'none'}")
    return known[name]()


def _read_toml(path: Path) -> dict[str, Any]:
    from infra.config import UserError

    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--config {path} can't be read: {error}") from error


def _overlay(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    nested = {k: _overlay(base[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **over, **nested}


def demo(config: Any) -> None:
    """The whole path, then a served world: with a page until Ctrl-C, or one scripted session."""
    from infra.cluster import connect
    from infra.config import Home
    from pipelines import presets
    from pipelines.path import STEPS, walk

    home = Home(config.home)
    path = {"demo": presets.demo_path, "tiny": presets.tiny_path}[config.size](config.home)
    minutes = {"demo": "about 17 minutes", "tiny": "about 2 minutes"}[config.size]
    steps = "".join(f"  {step.name:9} {step.what}\n" for step in STEPS)
    sys.stdout.write(
        f"Lampworks plays games, learns a world from the videos and serves it: {minutes} on two cores.\n"
        f"{steps}  serve     the world, to a browser\n"
        f"Everything is written to {home.path}. Ctrl-C at any time: the same command continues there.\n\n"
    )
    with connect(path.cluster):
        made = walk(path)
    sys.stdout.write(_headline(home, made["evaluate"]) + f"report: {made['report']}\n")
    _serve_demo(config, made["world"], path.evaluate.sampler)


def _headline(home: Any, evaluation: str) -> str:
    """What the world must reach on held-out footage and what it reached, a line each."""
    from infra.artifact import resolve

    bars = json.loads((resolve(home, evaluation).path / "measures.json").read_text())["bars"]
    rows = ((("  ok  " if bar["passed"] else "  LOW ") + bar["name"], bar) for bar in bars)
    return "".join(f"{name:42} {bar['value']:6.2f} {bar['unit']} (needs {bar['bar']})\n" for name, bar in rows)


def _serve_demo(config: Any, world: str, sampler: Any) -> None:
    """Serves what the demo made, drawing frames as the evaluation did."""
    from infra.config import Home
    from serving.app import serve_world
    from serving.config import ServeConfig

    port = config.port if config.browser else 0
    with serve_world(ServeConfig(home=config.home, world=world, port=port, sampler=sampler)) as served:
        if config.browser:
            sys.stdout.write(f"play:   {served.url}   (Ctrl-C stops)\n")
            webbrowser.open(served.url)
            served.wait()
        else:
            sys.stdout.write(_scripted_session(served.url, Home(config.home).reports / "session.mp4"))
        sys.stdout.write(f"next:   lampworks serve {world} --home {config.home}\n")


def _scripted_session(url: str, film: Path) -> str:
    """Plays every action five times in a row, keeps the film, and says what was seen."""
    from serving.client import WorldClient

    with WorldClient(url) as client, client.create(gallery="0", seed=0) as player:
        actions = [action for action in range(player.actions) for _ in range(5)]
        frames = {player.step(action).tobytes() for action in actions}
        film.write_bytes(player.export())
    return f"played: {len(actions)} steps, {len(frames)} different frames, film {film}\n"


def serve(config: Any) -> None:
    """Hosts the worlds until Ctrl-C."""
    from serving.app import serve_world

    with serve_world(config) as served:
        sys.stdout.write(f"play: {served.url}   (Ctrl-C stops; sessions are kept)\n")
        served.wait()


def promote(config: Any) -> None:
    """Gives an alias to a version, and says which version has which."""
    from infra.config import Home
    from infra.registry import Registry

    aliases = Registry(config.tracking, Home(config.home)).promote(config.reference, config.alias)
    sys.stdout.write("".join(f"{alias:10} {reference}\n" for alias, reference in sorted(aliases.items())))


def audit(config: Any) -> None:
    """Prints what the journal knows of every session."""
    from infra.config import Home
    from serving.store import open_store

    for session in open_store(config.store or str(Home(config.home).sessions_db)).audit():
        sys.stdout.write(json.dumps(session) + "\n")


def show(config: Any) -> None:
    """Everything in the home, one thing's record and lineage, or a preset beside the paper."""
    from infra.config import Home

    if config.what == "preset":
        lines = _show_preset(config.name)
    elif config.what:
        lines = _show_one(Home(config.home), config.what)
    else:
        lines = _show_all(Home(config.home))
    sys.stdout.write("\n".join(lines) + "\n")


def _show_preset(name: str) -> list[str]:
    """Computed sizes and costs beside the paper's, without taking the memory."""
    from infra.config import UserError
    from pipelines.paper import NAMES, describe

    if name not in NAMES:
        raise UserError(f"no preset {name!r}: there are {', '.join(NAMES)}")
    return [
        f"{row.item:52} {row.computed:>12.4g}" + (f"   paper {row.paper:.4g}" if row.paper else "")
        for row in describe(name)
    ]


def _show_all(home: Any) -> list[str]:
    from infra import artifact
    from pipelines import shards

    names = sorted(p.name for p in home.datasets.glob("*") if (p / "videos").is_dir())
    lines = [f"{shards.open_dataset(home, name).reference:24} dataset" for name in names]
    lines += [f"{a.reference:24} {a.kind:10} {a.created} from {_parents(a)}" for a in artifact.versions(home)]
    return lines or [f"nothing under {home.path} yet: lampworks demo, or lampworks record"]


def _show_one(home: Any, reference: str) -> list[str]:
    from infra import artifact
    from pipelines import shards

    if "://" in reference or (home.datasets / reference.split("@")[0]).is_dir():
        return [str(version) for version in shards.versions(home, reference.split("@")[0])]
    walked = artifact.lineage(home, reference)
    record = {k: v for k, v in artifact.describe(walked[0]).items() if k != "files"}
    return [json.dumps(record, indent=1), "", *(f"{a.reference} from {_parents(a)}" for a in walked)]


def _parents(found: Any) -> str:
    return ", ".join(f"{role} {reference}" for role, reference in sorted(found.parents.items())) or "nothing recorded"


def doctor(config: Any) -> None:
    """Checks this machine.

    Raises:
        SystemExit: 1 where something is to mend.
    """
    from infra.doctor import run

    if code := run(config):
        sys.exit(code)
