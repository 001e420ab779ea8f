"""`lampworks sweep`: the scaling study. Ray Tune runs the trials, each a training as `lampworks train` does it.

A trial that is finished is found, one that was stopped goes on from its checkpoint: so the sweep itself keeps no state,
and the same command continues it. What it found is an artifact with a page, and a run in MLflow with the trials' below.
"""

import json
import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from infra.artifact import Artifact, find, publish
from infra.cluster import connect
from infra.config import Home, UserError, digest, to_dict
from infra.plan import TrainingPlan
from infra.tracking import Run
from pipelines import page
from pipelines.jobs import Job, plan_job
from pipelines.progress import PROGRESS
from pipelines.scaling import Curve, Law, chart, fit
from pipelines.stages import estimate
from pipelines.sweep_config import SweepConfig
from pipelines.train import Interrupted, train
from pipelines.train_config import TrainConfig

log = logging.getLogger(__name__)

UNSETTLED = "These trials are too few or too short to trust the choice: it takes three sizes and bent curves."

Trials = dict[tuple[int, str], Job]
"""(batch, size) -> what is trained."""


def command(config: SweepConfig) -> Artifact | str:
    """`lampworks sweep`: with --train.dry-run it only says what the trials would take."""
    return dry_run(config) if config.train.dry_run else sweep(config)


def dry_run(config: SweepConfig) -> str:
    """Parameters, tokens and operations of each trial, and of all; needs no dataset."""
    plans = {(size, batch): _plan(config.trial(size, batch)) for batch in config.batches for size in config.sizes}
    lines = [
        f"{size} batch {batch}: {p.parameters / 1e6:.3g} M parameters, {p.seen_tokens:.3g} tokens, "
        f"{p.flops:.3g} operations"
        for (size, batch), p in plans.items()
    ]
    said = "\n".join([*lines, f"all: {sum(p.flops for p in plans.values()):.3g} operations"])
    log.info("dry run of sweep %s\n%s", config.train.stage, said)
    return said


def sweep(config: SweepConfig) -> Artifact:
    """Trains what is not trained yet, fits the law, publishes the study; an identical study is returned as it is.

    Raises:
        UserError: a trial can't be trained, it was interrupted, or the curves do not fix a law.
    """
    home = Home(config.train.home)
    trials = {(b, size): plan_job(config.trial(size, b)) for b in config.batches for size in config.sizes}
    key = digest(["sweep", config.budget_flops, sorted(job.identity for job in trials.values())])
    name = f"{config.train.artifact_name}-sweep"
    if done := find(home, name=name, identity=key):
        log.info("sweep %s: %s is this study already", config.train.stage, done.reference)
        return done
    folder = home.runs / f"{name}-{key[:12]}"
    run = Run(config.train.tracking, home, name=name, key=key, folder=folder)
    run.params(to_dict(config))
    run.flush()  # so that the trials find the run that they belong to
    try:
        with connect(config.train.cluster):
            _train(config, trials, key, folder)
        made = _study(config, trials, home, name, key, folder, run)
    except BaseException as error:
        run.event(f"ended: {type(error).__name__}: {str(error)[:300]}")
        run.close("KILLED" if isinstance(error, Interrupted) else "FAILED")
        raise
    run.event(f"published {made.reference}")
    run.close()
    return made


def _train(config: SweepConfig, trials: Trials, key: str, folder: Path) -> None:
    """All trials, `at_once` side by side; returns when each is an artifact."""
    from ray import tune

    tracking = replace(config.train.tracking, parent=key)
    every = [replace(job.config, tracking=tracking) for job in trials.values()]
    waiting = [trial for trial, job in zip(every, trials.values(), strict=True) if not _made(job)]
    for trial in every:
        if trial not in waiting:
            train(trial)  # which sends what was not yet told of it
    log.info("sweep %s | %d trials, %d to train", config.train.stage, len(trials), len(waiting))
    if not waiting:
        return
    results = tune.Tuner(
        tune.with_resources(_trial, {"CPU": 1}),
        param_space={"train": tune.grid_search(waiting)},
        tune_config=tune.TuneConfig(max_concurrent_trials=config.at_once),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    ).fit()
    shutil.rmtree(folder / "tune", ignore_errors=True)
    for error in results.errors:
        raise UserError(f"a trial of the sweep failed, the others are kept: {str(error).strip().splitlines()[-1]}")
    if not all(map(_made, trials.values())):
        raise Interrupted("the sweep stopped before its end: the same command continues it")


def _trial(params: dict[str, Any]) -> dict[str, float]:
    """What Tune runs in a process of its own."""
    return train(params["train"]).metrics


def _made(job: Job) -> Artifact | None:
    return find(Home(job.config.home), name=job.config.artifact_name, identity=job.identity)


def _plan(config: TrainConfig) -> TrainingPlan:
    return estimate(config, config.model)


def read_curve(job: Job, size: str) -> Curve:
    """A trial's losses from its journal; of a step that was taken twice, the later."""
    plan, wanted = estimate(job.config, job.model), "dynamics/loss" if job.config.stage == "world" else "loss"
    lines = map(json.loads, (job.folder / PROGRESS).read_text(encoding="utf-8").splitlines())
    losses = {line["step"]: line[wanted] for line in lines if "step" in line and wanted in line}
    return Curve(
        size=size, parameters=plan.parameters, batch=plan.batch, step_tokens=plan.batch * plan.frames * plan.tokens,
        token_flops=plan.frame_flops / plan.tokens, steps=sorted(losses), losses=[losses[s] for s in sorted(losses)],
    )  # fmt: skip


def _study(config: SweepConfig, trials: Trials, home: Home, name: str, key: str, folder: Path, run: Run) -> Artifact:
    """Fits a law for each batch size, chooses for the budget, and publishes numbers, charts and a page."""
    by_batch = {b: [read_curve(job, size) for (at, size), job in trials.items() if at == b] for b in config.batches}
    laws = {batch: fit(curves) for batch, curves in by_batch.items()}
    found = [_choice(batch, law, by_batch[batch][0], config.budget_flops) for batch, law in laws.items()]
    best = min(found, key=lambda choice: choice["loss"])
    said = (
        f"{config.budget_flops:.3g} operations are best spent on {best['parameters'] / 1e6:.3g} M parameters and "
        f"{best['tokens'] / 1e9:.3g} B tokens: {best['steps']:,.0f} steps of {best['batch']:.0f} windows, "
        f"loss {best['loss']:.4g}"
    )
    log.info("sweep %s | %s", config.train.stage, said)
    if not all(law.settled for law in laws.values()):
        log.warning("sweep %s | %s", config.train.stage, UNSETTLED)
    out = folder / "study"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    charts = {f"scaling-b{batch}": chart(by_batch[batch], law) for batch, law in laws.items()}
    for chart_name, svg in charts.items():
        (out / f"{chart_name}.svg").write_text(svg, encoding="utf-8")
    record = {
        "choice": best, "choices": found, "laws": {str(b): asdict(law) for b, law in laws.items()},
        "curves": [asdict(curve) for curves in by_batch.values() for curve in curves],
    }  # fmt: skip
    (out / "study.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    (out / "index.html").write_text(_page(config, said, charts, found, by_batch, laws), encoding="utf-8")
    for path in sorted(out.iterdir()):
        run.file(path, "study")
    run.metrics(config.train.steps, best)
    parents = {f"b{b}-{size}": made.reference for (b, size), job in trials.items() if (made := _made(job))}
    return publish(home, name=name, kind="study", source_dir=out, config=to_dict(config), parents=parents,
                   metrics=best, identity=key)  # fmt: skip


def _choice(batch: int, law: Law, curve: Curve, budget_flops: float) -> dict[str, float]:
    parameters, tokens = law.best(budget_flops)
    steps = tokens / curve.step_tokens
    return {
        "batch": batch,
        "parameters": parameters,
        "tokens": tokens,
        "steps": steps,
        "loss": law.loss(parameters, tokens),
    }


def _page(
    config: SweepConfig, said: str, charts: dict[str, str], found: list[dict[str, float]],
    by_batch: dict[int, list[Curve]], laws: dict[int, Law],
) -> str:  # fmt: skip
    """What was measured, the law of each batch size, and the choice."""
    figures = page.cards((page.figure(svg, f"batch {name.split('-b')[1]}") for name, svg in charts.items()), "pair")
    trials = page.table(
        ("size", "batch", "parameters", "tokens", "last loss", "law"),
        (
            (c.size, str(c.batch), f"{c.parameters / 1e6:.3g} M", f"{c.points()[-1][0] / 1e6:.4g} M",
             f"{c.points()[-1][1]:.4f}", f"{laws[c.batch].loss(c.parameters, c.points()[-1][0]):.4f}")
            for curves in by_batch.values() for c in curves
        ),
    )  # fmt: skip
    choices = page.table(
        ("batch", "parameters", "tokens", "steps", "loss", "floor", "alpha", "beta", "error"),
        (
            (f"{c['batch']:.0f}", f"{c['parameters'] / 1e6:.3g} M", f"{c['tokens'] / 1e9:.3g} B", f"{c['steps']:,.0f}",
             f"{c['loss']:.4g}", f"{w.floor:.3g}", f"{w.alpha:.2f}", f"{w.beta:.2f}", f"{w.error:.2%}")
            for c, w in zip(found, laws.values(), strict=True)
        ),
    )  # fmt: skip
    caution = page.note(
        "The law is loss = floor + (n/N)^alpha + (d/D)^beta over parameters N and tokens D; `error` is how far the "
        "points lie from it. A budget far beyond the trials is an extrapolation."
        + ("" if all(law.settled for law in laws.values()) else f" {UNSETTLED}")
    )
    title = f"Scaling of {config.train.stage}"
    header = f'<p class="kicker">Scaling study</p><h1>{title}</h1>'
    sections = [
        ("choice", "For the budget", page.lead(said) + choices + caution),
        ("curves", "Losses", figures),
        ("trials", "Trials", trials),
    ]
    return page.document(title, header, sections, "")
