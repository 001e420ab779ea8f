"""Prompts in words, by a real diffusers pipeline that is tiny and knows nothing: its weights are drawn here."""

import asyncio
import shutil

import httpx
import numpy as np
import pytest

from infra.config import UserError
from serving.config import ServeConfig
from serving.painter import Painter
from tests.serving.conftest import SIZE, gateway_of
from tests.serving.fabric import Fabric
from tests.serving.test_gateway import bearer, refused


def test_a_text_and_a_seed_make_one_picture(painter):
    def paint(text, seed):
        return asyncio.run(painter.paint(text, seed))

    picture = paint("a green hill", 1)
    assert (picture.shape, picture.dtype) == ((32, 32, 3), np.uint8)
    assert np.array_equal(paint("a green hill", 1), picture)
    assert not np.array_equal(paint("a green hill", 2), picture)
    assert not np.array_equal(paint("a dark cave", 1), picture)


def test_a_session_starts_from_words(painter, served_home, engine, tmp_path):
    with gateway_of(served_home, engine, tmp_path / "db", painter=painter) as url, httpx.Client(base_url=url) as http:
        assert http.get("/v1/models").json()["text_prompts"]
        made = http.post("/v1/sessions", json={"text": " a green hill ", "seed": 5}).json()
        again = http.post("/v1/sessions", data={"text": "a green hill", "seed": "5"}, files={"x": (None, "")}).json()
        first, second = (
            http.get(f"/v1/sessions/{m['session']}/frames/0.jpg", headers=bearer(m)).content for m in (made, again)
        )
        assert first == second
        assert (made["width_px"], made["height_px"]) == (SIZE, SIZE)
        for text in ("", "   ", "x" * 501):
            assert refused(http.post("/v1/sessions", json={"text": text}), 422, "bad-text")["limit"] == 500


def test_without_a_pipeline_words_are_refused(local):
    assert not httpx.get(f"{local}/v1/models").json()["text_prompts"]
    refused(httpx.post(f"{local}/v1/sessions", json={"text": "a hill"}), 422, "no-text-prompts")


def test_what_is_no_pipeline_says_so(tmp_path):
    with pytest.raises(UserError, match="no text-to-image pipeline there"):
        Painter(ServeConfig(text=str(tmp_path)))


def test_a_pipeline_of_pickles_is_refused(pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "sd")
    weights = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="no text-to-image pipeline there"):
        Painter(ServeConfig(text=str(tmp_path / "sd")))


def test_a_served_world_takes_words(pipeline, served_home, tmp_path):
    with Fabric(served_home, tmp_path, colocated=True, slots=2, text=str(pipeline), text_steps=2) as served:
        made = httpx.post(f"{served.url}/v1/sessions", json={"text": "a green hill", "seed": 5}, timeout=60)
        assert made.status_code == 201, made.text
        again = httpx.post(f"{served.url}/v1/sessions", json={"text": "a green hill", "seed": 5}, timeout=60).json()
        frames = [
            httpx.get(f"{served.url}/v1/sessions/{m['session']}/frames/0.jpg", headers=bearer(m)).content
            for m in (made.json(), again)
        ]
        assert frames[0] == frames[1]
