"""Tensor parallelism: workers that share each block's matrices, as DeepSpeed's AutoTP splits them (arXiv 1909.08053).

Attention is split by heads, the feed-forward by hidden features: each sums over the group once forward, once backward.
What is not one of their matrices (embeddings, outputs, codebooks, norms) is whole and equal on each of the workers.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from infra.config import UserError
from models.attention import Heads
from models.quantizer import Codebook
from models.transformer import FeedForward


def settings(model: nn.Module, size: int) -> dict[str, Any]:
    """DeepSpeed's `tensor_parallel` for groups of `size` workers.

    Raises:
        UserError: heads or hidden features of a block can't be shared by so many.
    """
    specs: list[dict[str, Any]] = []
    for name, module in model.named_modules():
        if isinstance(module, Heads):
            _share(name, size, heads=module.heads, key_value_heads=module.kv_heads)
            parts = [module.heads * module.size, *[module.kv_heads * module.size] * 2]
            specs += [
                {**_matrix(name, "qkv"), "partition_type": "column", "shape": [parts, -1], "partition_dim": 0},
                {**_matrix(name, "out"), "partition_type": "row"},
                # norms of a worker's own heads: their gains' gradients are parts of a sum
                {"patterns": [f"^{re.escape(name)}\\.gain$"], "partition_type": "skip", "grad_allreduce": True},
            ]
        elif isinstance(module, FeedForward):
            _share(name, size, hidden_features=module.up.out_features)
            specs += [
                {**_matrix(name, "up"), "partition_type": "column"},
                {**_matrix(name, "down"), "partition_type": "row"},
            ]
    if not specs:
        raise UserError(f"--tensor {size} has nothing to share: this stage's model has no transformer blocks")
    return {"autotp_size": size, "partition_config": {"use_default_specs": False, "layer_specs": specs}}


def split_parameters(model: nn.Module, size: int) -> int:
    """How many of a model's parameters a group of `size` shares; the others are whole on each worker.

    Raises:
        UserError: as `settings`.
    """
    settings(model, size)
    shared: list[nn.Linear] = []
    for module in model.modules():
        if isinstance(module, Heads):
            shared += module.qkv, module.out
        elif isinstance(module, FeedForward):
            shared += module.up, module.down
    return sum(linear.weight.numel() for linear in shared)


def _matrix(owner: str, part: str) -> dict[str, Any]:
    return {"patterns": [f"^{re.escape(owner)}\\.{part}\\.weight$"]}


def _share(name: str, size: int, **counts: int) -> None:
    for what, count in counts.items():
        if count % size:
            raise UserError(
                f"--tensor {size} does not divide the {count} {what.replace('_', ' ')} of {name}: "
                f"use a divisor of {count}, or 1"
            )


def settle(engine: Any, size: int) -> tuple[Any, Any]:
    """What AutoTP leaves to the model's owner, after DeepSpeed's engine has split the matrices.

    Returns:
        The process groups of workers that share matrices, and of those that take different samples.
    """
    from deepspeed.module_inject.layers import ColumnParallel
    from deepspeed.utils import groups

    engine.first_dataloader_check.remove()  # it can't look into dicts; the loop checks its samples itself
    tensor_group, data_group = groups.get_tensor_model_parallel_group(), groups.get_data_parallel_group()

    def sum_backward(_module: nn.Module, _inputs: tuple[Tensor, ...], y: Tensor) -> Any:
        return ColumnParallel.apply(tensor_group, y)

    for module in engine.module.modules():
        if isinstance(module, Heads):
            module.heads, module.kv_heads = module.heads // size, module.kv_heads // size
            # attention multiplies by parts of `qkv`'s matrix and passes its forward by, which would do this
            module.norm.register_forward_hook(sum_backward)
            module.out.register_forward_hook(_own)
        elif isinstance(module, FeedForward):
            module.down.register_forward_hook(_own)
        elif isinstance(module, Codebook):
            module.group = data_group
    return tensor_group, data_group


def _own(_module: nn.Module, _inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """Blocks add in the change's own memory, which autograd forbids with what a group's sum returns."""
    return y.clone()


@torch.no_grad()
def whole(model: nn.Module) -> dict[str, Tensor]:
    """The model's state with whole matrices. A collective of the group; ZeRO's own memory is left as it is."""
    from deepspeed.module_inject.layers import TensorParallel_Layer

    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, TensorParallel_Layer):
            weight = nn.Parameter(state[f"{name}.weight"].clone(), requires_grad=False)
            module.gather_params([weight])
            state[f"{name}.weight"] = weight.data
    return state
