"""A tiny world with random weights (a real one in all but training), published as an artifact and served."""

import contextlib
import json
import os
import socket
import subprocess
import threading
import time

import cv2
import numpy as np
import pytest
import ray
import torch

from infra.artifact import publish
from infra.config import Home
from models.actions import LatentActionModel
from models.config import (
    ActionsConfig,
    CodebookConfig,
    DynamicsConfig,
    SamplerConfig,
    TokenizerConfig,
    TransformerConfig,
)
from models.dynamics import Dynamics
from models.tokenizer import Tokenizer
from models.world import World
from serving.app import serve_world
from serving.config import ServeConfig
from serving.engine import Engine
from serving.gateway import Gateway
from serving.listen import server
from serving.painter import Painter
from serving.pictures import decode_jpeg, encode_jpeg
from serving.store import open_store
from serving.worlds import Worlds

SIZE, ACTIONS, FRAMES = 32, 5, 6
SAMPLER = SamplerConfig(steps=2)
MODEL, GATEWAY = "world-toy-v1", "gateway"


def tiny_world(**dynamics):
    torch.manual_seed(0)
    part = TransformerConfig(layers=2, width=32, heads=2, head_size=16, ff_ratio=2, window=FRAMES)
    codes = CodebookConfig(size=64, dim=8)
    shape = {"height_px": SIZE, "width_px": SIZE, "frames": FRAMES, "encoder": part, "decoder": part}
    dynamics |= {"rows": 4, "columns": 4, "vocabulary": 64, "actions": ACTIONS, "frames": FRAMES}
    return World(
        Tokenizer(TokenizerConfig(**shape, patch=8, codebook=codes)),
        LatentActionModel(ActionsConfig(**shape, patch=8, codebook=CodebookConfig(size=ACTIONS, dim=8))),
        Dynamics(DynamicsConfig(transformer=part, **dynamics)),
        fps=10.0,
    )


def picture(seed=0, height=48, width=64):
    """A colourful prompt picture, uint8 RGB."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)


def uninterrupted(world, prompt, seed, actions, title=""):
    """The frames of a session that nothing happens to, as a player sees them."""
    state, frames = world.start(prompt[None], seed, SAMPLER, title), []
    for action in actions:
        state, frame = world.step(state, action)
        frames.append(decode_jpeg(encode_jpeg(frame.numpy())))
    return frames


@pytest.fixture(scope="session")
def world():
    return tiny_world()


def publish_toy(world, folder):
    """A home that holds the world as toy@v1, with three prompt pictures."""
    world.save(folder / "world")
    (folder / "world" / "prompts").mkdir()
    for i in range(3):
        cv2.imwrite(str(folder / "world" / "prompts" / f"{i}.png"), picture(i, SIZE, SIZE)[..., ::-1])
    home = Home(folder / "home").ensure()
    publish(
        home, name="toy", kind="world", source_dir=folder / "world", config={}, parents={}, metrics={}, identity="toy"
    )
    return home


@pytest.fixture(scope="session")
def served_home(world, tmp_path_factory):
    """See `publish_toy`."""
    return publish_toy(world, tmp_path_factory.mktemp("serving"))


@contextlib.contextmanager
def listening(app, connection_s=20):
    """An ASGI application on a free port, in a thread, as a gateway listens."""
    doors, port = server(app, connection_s), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=doors.run, args=([port],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port.getsockname()[1]}"
    finally:
        doors.should_exit = True
        thread.join()


@contextlib.contextmanager
def gateway_of(home, engine, database, painter=None, **settings):
    """The doors over an engine in this process, without Ray: the same application that a Serve replica runs."""
    store = open_store(str(database))
    prompts = {engine.info.reference: home.artifacts / "toy" / "v1" / "prompts"}
    worlds = Worlds({engine.info.reference: engine}, prompts)
    gateway = Gateway(ServeConfig(home=home.path, world="toy", **settings), worlds, store, painter)
    with listening(gateway.app(), gateway.config.limits.connection_s) as url:
        yield url
    store.close()


@pytest.fixture(scope="session")
def engine(world):
    """The world's engine with four slots."""
    engine = Engine(world, reference="toy@v1", sampler=SAMPLER, slots=4)
    engine.warm_up()
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def local(served_home, engine, tmp_path_factory):
    """URL of a gateway with default settings."""
    with gateway_of(served_home, engine, tmp_path_factory.mktemp("local") / "sessions.db") as url:
        yield url


@pytest.fixture(scope="package")
def served(served_home, ray_cluster):
    """The world on Ray Serve behind its proxy: two gateways, two model replicas."""
    config = ServeConfig(
        home=served_home.path, world="toy", port=0, gateways=2, replicas=2, slots=4, sampler=SAMPLER, proxy=True
    )
    with serve_world(config) as served:
        yield served


def replicas(deployment):
    """Process ids of a deployment's replicas."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    names = [a["name"] for a in actors if f"#{deployment}#" in a["name"]]
    found = []
    for name in names:
        actor = ray.get_actor(name, namespace="serve")
        found.append(ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=20))
    return found


def start_redis(folder, url):
    """A Redis at a URL's port that hands every commit to the kernel before it answers."""
    port = url.rpartition(":")[2]
    options = ["--port", port, "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--loglevel", "warning"]
    durable = ["--appendonly", "yes", "--appendfsync", "always"]
    server = subprocess.Popen(["redis-server", *map(str, options), *durable], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), 1):
            return server
        time.sleep(0.02)
    stop(server)
    raise AssertionError("redis-server did not start")


def stop(process):
    process.kill()
    process.wait()


@contextlib.contextmanager
def running_redis(folder):
    """A Redis on a free port: its URL and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{probe.getsockname()[1]}"
    server = start_redis(folder, url)
    try:
        yield url, server
    finally:
        stop(server)


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def painter(pipeline):
    return Painter(ServeConfig(text=str(pipeline), text_steps=2))
