"""Prompts in words, by a real diffusers pipeline that is tiny and knows nothing: its weights are drawn here."""

import asyncio
import json

import httpx
import numpy as np
import pytest

from infra.config import UserError
from serving.config import ServeConfig
from serving.painter import Painter
from tests.serving.conftest import SIZE, gateway_of
from tests.serving.test_gateway import bearer, refused


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder with a Stable Diffusion pipeline of a few thousand weights."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("pipeline")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, norm_num_groups=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), unet=unet, scheduler=DDIMScheduler(), safety_checker=None,
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77),
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "sd")  # fmt: skip
    return folder / "sd"


@pytest.fixture(scope="module")
def painter(pipeline):
    return Painter(ServeConfig(text=str(pipeline), text_steps=2))


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
    import shutil

    shutil.copytree(pipeline, tmp_path / "sd")
    weights = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="no text-to-image pipeline there"):
        Painter(ServeConfig(text=str(tmp_path / "sd")))
