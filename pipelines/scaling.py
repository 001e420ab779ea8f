"""A power law through loss curves of several sizes, and the size that a budget of operations is best spent on.

loss(N, D) = floor + (n / N)^alpha + (d / D)^beta for N parameters and D tokens: the third approach of Hoffmann et al.
(arXiv 2203.15556, section 3.3 and D.2). The paper's own study (section 3.1, figure 9) plots the same curves.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from infra.config import UserError
from pipelines.figures import Line, line_chart

POINTS = 8
"""Of a curve that enter the fit, evenly spread over the logarithm of its steps."""
SETTLED = 0.25
"""Share of the steps that a curve needs to be on the law at all: warm-up and the first unlearning are left out."""
LEAST, MOST = 0.01, 3.0
"""Exponents that are tried."""
HUBER = 1e-2
"""Errors of the log loss above this count linearly, as that paper does; its curves are smoother (1e-3)."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One trial's losses.

    Attributes:
        size: its name.
        parameters: N.
        batch: windows of a step.
        step_tokens: tokens of a step.
        token_flops: operations of training per token.
        steps: at which the losses were read, ascending.
        losses: means since the reading before.
    """

    size: str
    parameters: int
    batch: int
    step_tokens: int
    token_flops: float
    steps: Sequence[int]
    losses: Sequence[float]

    def points(self) -> list[tuple[float, float]]:
        """(tokens, loss) of the settled part, averaged into at most POINTS bins."""
        steps, losses = np.asarray(self.steps, float), np.asarray(self.losses, float)
        kept = (steps > SETTLED * steps[-1]) & np.isfinite(losses)
        edges = np.geomspace(SETTLED * steps[-1], steps[-1] * 1.0001, POINTS + 1)
        bins = np.digitize(steps, edges)
        found = [kept & (bins == n) for n in range(1, POINTS + 1)]
        return [(float(steps[b].mean() * self.step_tokens), float(losses[b].mean())) for b in found if b.any()]


@dataclass(frozen=True, kw_only=True)
class Law:
    """The fitted law and how far the points lie from it.

    Attributes:
        floor: loss that no size and no data lowers.
        n, alpha: of the term in parameters.
        d, beta: of the term in tokens.
        token_flops: operations of training per token and parameter.
        error: root mean square of the relative error at the points.
        sizes: how many were fitted.
    """

    floor: float
    n: float
    alpha: float
    d: float
    beta: float
    token_flops: float
    error: float
    sizes: int

    @property
    def settled(self) -> bool:
        """Whether the points fix both exponents: two sizes do not, nor does one at the edge of what is tried."""
        return self.sizes > 2 and all(1.01 * LEAST < exponent < 0.99 * MOST for exponent in (self.alpha, self.beta))

    def loss(self, parameters: float, tokens: float) -> float:
        """What the law says."""
        return self.floor + (self.n / parameters) ** self.alpha + (self.d / tokens) ** self.beta

    def best(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens of the least loss for so many operations: where both terms' slopes are equal."""
        product = flops / self.token_flops  # N * D
        weight = (self.alpha * self.n**self.alpha) / (self.beta * self.d**self.beta)
        parameters = (weight * product**self.beta) ** (1 / (self.alpha + self.beta))
        return parameters, product / parameters


def fit(curves: Sequence[Curve]) -> Law:
    """The law of curves of one batch size.

    Raises:
        UserError: fewer than two sizes, or too few points for five unknowns.
    """
    rows = [(curve.parameters, tokens, loss) for curve in curves for tokens, loss in curve.points()]
    if len({n for n, _, _ in rows}) < 2 or len(rows) < 8:
        raise UserError(
            f"{len(rows)} points of {len({n for n, _, _ in rows})} sizes do not fix a power law: "
            "sweep more sizes or steps, or set a smaller --train.log-every"
        )
    N, D, L = np.asarray(rows).T
    # in units of the middle of the data, and in logarithms: five numbers of one size
    middle_n, middle_d = np.exp(np.log(N).mean()), np.exp(np.log(D).mean())

    def terms(x: np.ndarray) -> np.ndarray:
        a, alpha, b, beta, floor = x
        return np.exp(a - alpha * np.log(N / middle_n)) + np.exp(b - beta * np.log(D / middle_d)) + np.exp(floor)

    def error(x: np.ndarray) -> np.ndarray:
        return np.log(terms(x)) - np.log(L)

    least = float(L.min())
    starts = itertools.product((0.1, 0.5), (0.1, 0.5), (0.1, 0.5, 0.9))
    bounds = ([-20, LEAST, -20, LEAST, -20], [10, MOST, 10, MOST, float(np.log(least))])
    found = min(
        (
            least_squares(error, x0=_start(alpha, beta, least, share),
                          bounds=bounds, loss="huber", f_scale=HUBER)
            for alpha, beta, share in starts
        ),
        key=lambda result: result.cost,
    )  # fmt: skip
    a, alpha, b, beta, floor = found.x.tolist()
    return Law(
        floor=float(np.exp(floor)), n=float(middle_n * np.exp(a / alpha)), alpha=alpha,
        d=float(middle_d * np.exp(b / beta)), beta=beta,
        token_flops=float(np.mean([curve.token_flops / curve.parameters for curve in curves])),
        sizes=len({curve.parameters for curve in curves}),
        error=float(np.sqrt(np.mean((terms(found.x) / L - 1) ** 2))),
    )  # fmt: skip


def _start(alpha: float, beta: float, least: float, share: float) -> list[float]:
    rest = float(np.log(least * (1 - share) / 2))
    return [rest, alpha, rest, beta, float(np.log(least * share * 0.999))]


def chart(curves: Sequence[Curve], law: Law) -> str:
    """Losses over operations, each size's law dashed, and the least loss that the law promises for each budget."""
    lines: list[Line] = []
    spans: list[float] = []
    for tone, curve in enumerate(sorted(curves, key=lambda c: c.parameters)):
        points = curve.points()
        tokens = [t for t, _ in points]
        x = np.log10(np.asarray(tokens) * curve.token_flops).tolist()
        spans += x
        lines.append(Line(label=curve.size, x=x, y=[loss for _, loss in points], tone=tone))
        lines.append(Line(label="", x=x, y=[law.loss(curve.parameters, t) for t in tokens], tone=tone, dashed=True))
    budgets = np.linspace(min(spans), max(spans), 32)
    best = [law.loss(*law.best(10.0**c)) for c in budgets]
    lines.append(Line(label="best by the law", x=budgets.tolist(), y=best, tone=len(curves), dashed=True))
    return line_chart(lines, x_label="operations, as a power of 10", y_label="loss")
