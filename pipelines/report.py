"""One self-contained HTML page about a world: what it learned from, how it trained, what it can do.

    lampworks report world-evaluation

Nothing in the page is fetched: pictures are data URIs, plots inline SVG, and there is no script.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from infra.artifact import Artifact, lineage, resolve
from infra.config import Home
from infra.tracking import history
from pipelines import curation_report, page
from pipelines.config import ReportConfig
from pipelines.figures import SMALL, Line, data_uri, histogram, line_chart
from pipelines.shards import KEPT, Dataset, open_dataset

log = logging.getLogger(__name__)

Curves = dict[str, list[tuple[int, float]]]
"""metric -> (step, value)"""
FRAME_S = 0.16
TELLING = {"loss", "psnr", "gain_db", "accuracy", "perplexity", "codes_used"}
"""Curves that are shown at once; the others unfold."""
MEANING = {
    "Pictures survive tokens": "Held-out frames turned into tokens and back, against the originals. From about 30 dB "
    "small sprites stay readable.",
    "Latent actions in use": "How many of the buttons it really found. It discovered them from video alone; one button "
    "that explains everything would give 1.",
    "Latent actions mean something": "Agreement of a discovered button with what was really pressed, or seen to move: "
    "0 is none, 1 is perfect.",
    "Random actions do worse": "Some frames after one start picture: how much nearer to what happened the world "
    "stays with the inferred actions than with random ones.",
    "Shuffled actions do worse": "The same against actions shuffled between clips, each as frequent as in "
    "play. A world that ignores its actions gets exactly 0.",
}
SIGNALS = {
    "motion": "motion",
    "static_share": "share of still frames",
    "blur": "sharpness (variance of the Laplacian)",
    "contrast": "contrast of luma",
}


def report(config: ReportConfig) -> Path:
    """Writes `reports/<evaluation>.html` of the home from what is published there, or the page of a dataset's curation.

    Raises:
        UserError: there is no such evaluation, or its dataset is gone.
    """
    home = Home(config.home)
    name = config.evaluation.partition("@")[0]
    if not (home.artifacts / name).is_dir() and (home.datasets / name / "videos").is_dir():
        return curation_report.report(home, open_dataset(home, config.evaluation))
    evaluation = resolve(home, config.evaluation, kind="evaluation")
    made_from = lineage(home, evaluation.reference)
    dataset = open_dataset(home, evaluation.parents["dataset"])
    tables = json.loads((evaluation.path / "measures.json").read_text(encoding="utf-8"))
    curves = {a.reference: history(config.tracking, home, a.identity) for a in made_from[1:]}
    sections = [
        ("glance", "At a glance", _glance(tables)),
        ("actions", "What each action does", _actions(evaluation, tables)),
        ("control", "Do actions steer?", _control(evaluation, tables)),
        ("meaning", "What actions mean", _meaning(evaluation.metrics, tables)),
        ("tokens", "Pictures", _tokens(evaluation, tables)),
        ("data", "Footage", _data(dataset, config.pictures)),
        ("training", "Training", _training(curves)),
        ("lineage", "Lineage", _lineage(made_from, dataset)),
    ]
    footer = f"{evaluation.reference}, made {evaluation.created}. This file is complete: it loads nothing."
    text = page.document(evaluation.parents["world"], _header(evaluation, tables), sections, escape(footer))
    path = home.reports / f"{evaluation.reference}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
    log.info("report | %s | %.1f MB | %s", evaluation.reference, len(text) / 1e6, path)
    return path


def _header(evaluation: Artifact, tables: dict[str, Any]) -> str:
    seen, bars = tables["clips"], tables["bars"]
    passed = sum(bar["passed"] for bar in bars)
    said = (
        "A playable world learned from video alone: nobody told it which keys were pressed. Measured on footage it "
        f"never saw: {seen['windows']} windows of {seen['frames']} frames, {seen['width_px']}x{seen['height_px']} px, "
        f"of {evaluation.parents['dataset']}. It reaches {passed} of {len(bars)} bars."
    )
    return f'<p class="kicker">World report</p><h1>{escape(evaluation.parents["world"])}</h1>{page.lead(said)}'


def _glance(tables: dict[str, Any]) -> str:
    """The bars, with what each number means."""
    return page.cards(
        page.card(
            bar["name"],
            f"{bar['value']:.2f}",
            bar["unit"],
            bar["passed"],
            [bar["note"], MEANING.get(bar["name"], ""), f"Bar: {bar['bar']}."],
        )
        for bar in tables["bars"]
    )


# -- what it can do ----------------------------------------------------------------------------------------------


def _actions(evaluation: Artifact, tables: dict[str, Any]) -> str:
    """One row per latent action: the same start picture, the action held."""
    said = (
        "Each row starts from the same held-out picture and holds one action. Motion is measured in the rollouts from "
        f"{tables['starts']} start pictures; the one shown is that in which the actions differ most."
    )
    return page.lead(said) + "".join(_action_row(evaluation, held, tables) for held in tables["holding"])


def _action_row(evaluation: Artifact, held: dict[str, Any], tables: dict[str, Any]) -> str:
    action, counts, frames = held["action"], tables["actions"]["counts"], tables["clips"]["frames"]
    share = counts[action] / max(sum(counts), 1)
    picture = data_uri((evaluation.path / f"action-{action}.png").read_bytes())
    ratio = tables["clips"]["width_px"] / tables["clips"]["height_px"]
    motion = f"{held['right_px']:+z.1f} px across, {held['down_px']:+z.1f} px down a frame"
    return (
        f'<div class="action{"" if held["live"] else " dead"}"><div class="reel" style="aspect-ratio:{ratio:.4f}">'
        f'<img src="{picture}" alt="" style="animation:play {frames * FRAME_S:.2f}s steps({frames}) infinite"></div>'
        f'<div><b>Action {action}</b><div class="what">{_words(held)}</div><div class="note">{motion}</div>'
        f'<div class="meter"><i style="width:{share:.1%}"></i></div><div class="note">{share:.0%} of held-out steps'
        f'</div></div><div class="strip"><img class="pixels" style="max-width:{frames * 6}rem" src="{picture}" '
        f'alt="Action {action} held for {frames - 1} frames"></div></div>'
    )


def _words(held: dict[str, Any]) -> str:
    """What the motion of the scene says about the player."""
    if not held["live"]:
        return "hardly ever used"
    if held["effect"] == "still":
        return "the scene stays"
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    towards = " ".join(opposite[word] for word in held["effect"].split())
    return f"going {towards} (the scene slides {held['effect']})"


def _control(evaluation: Artifact, tables: dict[str, Any]) -> str:
    """Delta-PSNR over t, rollouts against the truth."""
    control, m = tables["control"], evaluation.metrics
    at = f"frame {control['t']}"
    readings = {
        f"{at}, actions shuffled between clips": "dpsnr",
        f"{at}, random live actions": "dpsnr_uniform",
        f"{at}, shuffled, the half of the clips that moves most": "dpsnr_moving",
        "true past, only the last action swapped": "dpsnr_forced",
    }
    rows = [
        (text, f"{m[f'{key}_db']:+.2f} dB", f"{m[f'{key}_low_db']:+.2f} to {m[f'{key}_high_db']:+.2f}")
        for text, key in readings.items()
    ]
    return (
        page.lead(
            "From one true frame the world is rolled out twice with the same random numbers: with the actions inferred "
            "from what really happened, and with others. The difference in PSNR (ΔPSNR) is what the actions are worth."
        )
        + page.cards(
            [
                page.chart(evaluation.path / "dpsnr.svg", "Mean over clips; the shade is the 95% interval."),
                page.chart(evaluation.path / "rollouts.svg", "How long rollouts stay with the truth."),
            ],
            "pair",
        )
        + page.table(("ΔPSNR", "mean", "95% interval"), rows)
        + page.picture(
            evaluation.path / "rollouts.png",
            "Held-out clips. The first column is the only frame given; both made rows share their random numbers.",
            tables["rows"]["rollouts"],
            tables["clips"]["frames"],
        )
        + _refinement(evaluation, tables)
        + _distances(m)
    )


def _refinement(evaluation: Artifact, tables: dict[str, Any]) -> str:
    """Quality and speed by refinement steps, where they were compared."""
    if "refinement" not in tables:
        return ""
    found = tables["refinement"]
    rows = [(f"{r['steps']:.0f}", f"{r['psnr_db']:.1f} dB", f"{r['fps']:.1f}") for r in found["rows"]]
    said = f"Inferred actions, {found['windows']} windows, rolled out together; frames per second of them all."
    return "<h3>How many refinement steps a frame needs</h3>" + page.cards(
        [
            page.chart(evaluation.path / "refinement.svg", said),
            page.table(("steps a frame", "rollouts' PSNR", "frames/s"), rows),
        ],
        "pair",
    )


def _distances(metrics: dict[str, float]) -> str:
    """Distances of distributions of clips, where enough windows were there."""
    if "frd3d" not in metrics:
        return ""
    names = {
        "frd3d_floor": "other real clips (the floor)",
        "frd3d_tokens": "real clips, to tokens and back",
        "frd3d": "made by the world, inferred actions",
        "frd3d_shuffled": "real clips, frames shuffled",
        "frd3d_frozen": "real first frame, frozen",
    }
    count = f"{metrics['frd3d_windows']:.0f} windows on each side"
    rows = [
        (text, f"{metrics[key]:.2f}", f"{metrics[key] / metrics['frd3d_floor']:.1f}") for key, text in names.items()
    ]
    return (
        "<h3>Do the clips look and move like real ones?</h3>"
        + page.table(("frd3d to real clips", "distance", "times the floor"), rows)
        + page.note(
            f"Frechet distance on the features of a random 3D network, {count}. It sees damage to pictures and motion, "
            "not control, and can't be compared with published FVD."
        )
    )


def _meaning(metrics: dict[str, float], tables: dict[str, Any]) -> str:
    """Latent actions against keys and visible motion."""
    rows = [
        (text, *(f"{metrics[key + part]:.2f}" for part in ("", "_chance", "_bound")))
        for key, text in (("nmi_effect", "with the motion seen in the picture"), ("nmi_action", "with the key pressed"))
        if key in metrics
    ]
    actions = tables["actions"]
    check = ""
    if "alignment" in actions:
        said = ", ".join(f"{value:.2f} at {lag}" for lag, value in actions["alignment"].items())
        check = page.note(f"Alignment check, agreement with the keys moved by a frame: {said}; 0 is the right place.")
    return (
        page.lead(
            "Latent actions are numbers without names. Normalised mutual information (NMI) says how far they agree "
            "with what can be checked from outside. The keys were recorded for this page only and never trained on."
        )
        + page.table(("NMI of latent actions", "measured", "by chance", "reachable"), rows)
        + check
        + "<h3>What was seen to move, by latent action</h3>"
        + page.heat(actions["directions"], [(f"action {a}", row) for a, row in enumerate(actions["effects"])])
    )


def _tokens(evaluation: Artifact, tables: dict[str, Any]) -> str:
    """What the tokenizer keeps, and how well its tokens are predicted."""
    m, tokens = evaluation.metrics, tables["tokens"]
    used, chance = sum(count > 0 for count in tokens["counts"]), math.log(tokens["size"])
    moving = "moving half {:.1f} dB"
    rows = [
        ("To tokens and back", f"{m['tokenizer_psnr_db']:.1f} dB", moving.format(m["tokenizer_psnr_moving_db"])),
        ("Copying the frame before", f"{m['copy_psnr_db']:.1f} dB", moving.format(m["copy_psnr_moving_db"])),
        ("Structural similarity (SSIM)", f"{m['tokenizer_ssim']:.3f}", "1 is equal"),
        ("Codes in use", f"{used} of {tokens['size']}", f"perplexity {m['tokens_perplexity']:.0f}"),
        ("Tokens that stay when nothing moves", f"{m['token_stability_still']:.0%}", "last frame repeated"),
        ("Tokens that move along", f"{m['token_stability_shift']:.0%}", "picture shifted by one patch"),
        ("Masked tokens guessed right", f"{m['masked_accuracy']:.0%}", f"{100 / tokens['size']:.1g}% by chance"),
        ("Their cross-entropy", f"{m['masked_loss']:.2f} nats", f"{chance:.2f} by chance"),
    ]
    return (
        page.lead("The tokenizer squeezes each frame into a few numbers, and the world thinks in those alone.")
        + page.table(("On held-out clips", "", ""), rows)
        + page.picture(
            evaluation.path / "reconstructions.png",
            "Held-out clips, and what is left of them in tokens.",
            tables["rows"]["reconstructions"],
            tables["clips"]["frames"],
        )
    )


# -- where it comes from -----------------------------------------------------------------------------------------


def _data(dataset: Dataset, most: int) -> str:
    """The curation funnel, outcomes with reasons, contact sheets, distributions."""
    videos = dataset.video_table(
        ["video_id", "title", "outcome", "reason", "detail", "clips", "windows", "preview"]
    ).to_pylist()
    clips = dataset.clip_table(["split", *SIGNALS])
    split = Counter(clips["split"].to_pylist())
    kept, lost = ([v for v in videos if (v["outcome"] in KEPT) is good] for good in (True, False))
    said = (
        f"{dataset.reference}: {split['train']} clips to learn from and {split['test']} held out, split by video, so "
        "that no episode is on both sides."
    )
    charts = (page.figure(histogram(_known(clips, name), label=label)) for name, label in SIGNALS.items())
    return (
        page.lead(said)
        + _funnel(videos, clips.num_rows)
        + _reasons(videos)
        + page.sheet("Videos kept", [_shot(v) for v in kept], most)
        + page.sheet("Videos left out", [_shot(v) for v in lost], most)
        + page.sheet("Clips left out of them", [_clip_shot(v, w) for v in kept for w in _dropped(v)], most)
        + "<h3>The kept clips</h3>"
        + page.cards(charts, "small")
    )


def _known(clips: Any, column: str) -> list[float]:
    return [value for value in clips[column].to_pylist() if value is not None]


def _funnel(videos: list[dict[str, Any]], clips: int) -> str:
    """What was left after each kind of loss, in videos, then in clips."""
    left = len(videos)
    steps = [("videos found", left)]
    for outcome, name in (
        ("duplicate", "not seen before"),
        ("dead_letter", "readable"),
        ("rejected", "with good clips"),
    ):
        left -= sum(v["outcome"] == outcome for v in videos)
        steps.append((name, left))
    cut = sum(len(v["windows"] or ()) for v in videos)
    return page.bars(steps) + page.bars([("clips looked at", max(cut, clips)), ("clips kept", clips)])


def _reasons(videos: list[dict[str, Any]]) -> str:
    """Why videos and clips were left out, most frequent first."""
    of_videos = Counter((v["reason"] or "", v["outcome"].replace("_", " ")) for v in videos if v["outcome"] not in KEPT)
    of_clips = Counter((w["reason"], "clip") for v in videos for w in _dropped(v))
    rows = [(reason, what, str(n)) for (reason, what), n in (of_videos + of_clips).most_common()]
    return "<h3>Why videos and clips were left out</h3>" + page.table(("reason", "what", "times"), rows) if rows else ""


def _shot(video: dict[str, Any]) -> page.Shot:
    """A video of the ledger on a contact sheet."""
    if video["outcome"] in KEPT:
        said = f"{video['clips']} clip{'s' * (video['clips'] != 1)}"
    else:
        said = ": ".join(part for part in (video["reason"], video["detail"]) if part)[:140]
    return page.Shot(
        video["preview"], video["title"] or video["video_id"], f"{video['outcome'].replace('_', ' ')}, {said}"
    )


def _dropped(video: dict[str, Any]) -> list[dict[str, Any]]:
    """The windows of a video that did not become clips."""
    return [window for window in video["windows"] or () if window["reason"]]


def _clip_shot(video: dict[str, Any], window: dict[str, Any]) -> page.Shot:
    said = f"from {window['start_s']:.0f} s, {window['reason']}"
    return page.Shot(window["preview"], video["title"] or video["video_id"], said)


def _training(curves: dict[str, Curves]) -> str:
    """Every curve that tracking holds for the models of this world; the telling ones first, the rest folded away."""
    parts: list[str] = []
    for reference, metrics in curves.items():
        drawn = {name: points for name, points in sorted(metrics.items()) if len({value for _, value in points}) > 1}
        telling = [_training_chart(*c) for c in drawn.items() if c[0].split("/")[-1] in TELLING]
        rest = [_training_chart(*c) for c in drawn.items() if c[0].split("/")[-1] not in TELLING]
        if drawn:
            parts.append(f"<h3>{escape(reference)}</h3>{page.cards(telling, 'small')}")
        if rest:
            parts.append(f"<details><summary>{len(rest)} more curves</summary>{page.cards(rest, 'small')}</details>")
    return "".join(parts) or page.lead("Tracking holds no curves of these models.")


def _training_chart(name: str, points: list[tuple[int, float]]) -> str:
    line = Line(label=name, x=[step for step, _ in points], y=[value for _, value in points])
    return page.figure(line_chart([line], x_label="step", y_label="", size=SMALL), name)


def _lineage(made_from: Sequence[Artifact], dataset: Dataset) -> str:
    """From the source videos to this evaluation, and the commands that measure it again."""
    videos = dataset.video_table(["uri"]).num_rows
    links = [("dataset", dataset.reference, f"{videos} source videos")]
    links += [
        (a.kind, a.reference, f"{a.created[:16].replace('T', ' ')} UTC, {a.fingerprint[:12]}") for a in made_from[::-1]
    ]
    details = "".join(
        f"<details><summary>Settings of {escape(a.reference)}, code {escape(a.git_commit[:12])}</summary>"
        f"<pre>{escape(json.dumps(a.config, indent=1))}</pre></details>"
        for a in made_from[::-1]
    )
    evaluation = made_from[0]
    commands = [
        f"git checkout {evaluation.git_commit.removesuffix('+dirty')[:12]} && make setup",
        f"lampworks evaluate {evaluation.parents['world']} --dataset {dataset.reference}",
        f"lampworks report {evaluation.reference}",
    ]
    return (
        page.lead("Every step names what it was made from. A command whose result exists already does nothing.")
        + page.chain(links)
        + f"<h3>Measure it again</h3><pre>{escape(chr(10).join(commands))}</pre>{details}"
    )
