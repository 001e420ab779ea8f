"""An agent: a policy that plays, and how well it does what was done in footage that it never saw."""

from typing import cast

import numpy as np
import torch

from models.config import SamplerConfig
from models.policy import Policy
from models.world import World


def agreement(policy: Policy, frames: np.ndarray, actions: np.ndarray) -> dict[str, float]:
    """How often the policy would have done what was done.

    Args:
        policy: with a window of T frames.
        frames: uint8 (B,T,H,W,3).
        actions: what was done after the last frame, (B,).

    Returns:
        `held_out/accuracy`, and `held_out/commonest`: what doing the commonest action always would reach.
    """
    right = policy.act(torch.from_numpy(frames)).numpy() == actions
    return {
        "held_out/accuracy": float(right.mean()),
        "held_out/commonest": float(np.bincount(actions).max() / len(actions)),
    }


def play(
    policy: Policy, world: World, prompt: np.ndarray, frames: int, seed: int, sampler: SamplerConfig
) -> np.ndarray:
    """The world as the policy plays it from a picture (H,W,3): uint8 (frames,H,W,3), the picture first."""
    seen = [torch.from_numpy(prompt)]
    state = world.start(seen[0][None], seed, sampler)
    while len(seen) < frames:
        state, frame = world.step(state, int(policy.act(torch.stack(seen)[None])))
        seen.append(frame)
    return cast(np.ndarray, torch.stack(seen).numpy())
