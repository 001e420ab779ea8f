"""The law behind a scaling study: found again from curves that follow one, and the choice that it makes."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.config import UserError
from pipelines.scaling import Curve, Law, chart, fit

TRUE = Law(floor=1.7, n=2e5, alpha=0.4, d=3e6, beta=0.35, token_flops=6.0, error=0.0, sizes=4)


def curve(parameters, law=TRUE, noise=0.0, steps=400, **changes):
    seen = np.arange(10, steps + 1, 10)
    rng = np.random.default_rng(parameters)
    losses = [law.loss(parameters, s * 4096) * float(np.exp(noise * rng.normal())) for s in seen.tolist()]
    base = dict(size=str(parameters), parameters=parameters, batch=16, step_tokens=4096, token_flops=6.0 * parameters,
                steps=seen.tolist(), losses=losses)  # fmt: skip
    return Curve(**{**base, **changes})


SIZES = (100_000, 400_000, 1_600_000, 6_400_000)


def test_a_known_law_is_found_again_and_foretells_a_larger_trial():
    law = fit([curve(n) for n in SIZES[:3]])
    assert law.error < 1e-3 and law.settled
    assert law.loss(SIZES[3], 4e6) == pytest.approx(TRUE.loss(SIZES[3], 4e6), rel=0.02)
    noisy = fit([curve(n, noise=0.01) for n in SIZES])
    assert noisy.loss(SIZES[3], 2e6) == pytest.approx(TRUE.loss(SIZES[3], 2e6), rel=0.03)
    assert 0.002 < noisy.error < 0.02


@settings(max_examples=40, deadline=None)
@given(flops=st.floats(1e10, 1e22), tilt=st.floats(0.3, 3.0))
def test_no_other_split_of_a_budget_is_better(flops, tilt):
    parameters, tokens = TRUE.best(flops)
    assert parameters * tokens * TRUE.token_flops == pytest.approx(flops)
    assert TRUE.loss(parameters, tokens) <= TRUE.loss(parameters * tilt, tokens / tilt) + 1e-12
    larger, more = TRUE.best(10 * flops)
    assert larger > parameters and more > tokens


def test_a_spike_or_a_step_that_was_not_finite_does_not_bend_the_law():
    bent = curve(SIZES[1])
    losses = list(bent.losses)
    losses[-5], losses[-9] = float("nan"), 50.0
    law = fit([curve(SIZES[0]), curve(SIZES[1], losses=losses), curve(SIZES[2])])
    assert law.loss(SIZES[2], 1.5e6) == pytest.approx(TRUE.loss(SIZES[2], 1.5e6), rel=0.03)


def test_two_sizes_or_an_exponent_at_the_edge_are_not_trusted():
    steep = Law(floor=1.0, n=1e5, alpha=5.0, d=3e6, beta=0.35, token_flops=6.0, error=0.0, sizes=4)
    assert not fit([curve(n, law=steep) for n in SIZES[:3]]).settled
    assert not fit([curve(n) for n in SIZES[:2]]).settled


def test_too_little_does_not_fix_a_law():
    with pytest.raises(UserError, match="of 1 sizes do not fix a power law: sweep more sizes or steps"):
        fit([curve(SIZES[0]), curve(SIZES[0])])
    with pytest.raises(UserError, match="4 points of 2 sizes"):
        fit([curve(n, steps=20) for n in SIZES[:2]])


def test_the_chart_shows_every_size_its_law_and_the_best(tmp_path):
    law = fit(curves := [curve(n) for n in SIZES[:3]])
    drawn = ET.fromstring(chart(curves, law))
    lines = drawn.findall(".//{*}polyline")
    assert len(lines) == 2 * 3 + 1
    assert sum("stroke-dasharray" in line.attrib for line in lines) == 4
    words = {text.text for text in drawn.findall(".//{*}text")}
    assert {*map(str, SIZES[:3]), "best by the law", "loss"} <= words
