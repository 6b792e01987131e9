# SPDX-License-Identifier: Apache-2.0
"""Training on several ranks, in processes that talk by gloo: FSDP2, checkpointing and DDP."""

import pytest
import torch
from families.case import assert_close
from families.vision_transformer import make as tiny_vit
from ranks import process_group
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from uhd_ops import (
    insert_early_compressor,
    insert_progressive_compression,
    remove_early_compressor,
)

LAYER = 1
ROUNDINGS = 12 * 512  # as in families/case.py: a mean over ranks adds in another order


def make(compressed=True):
    torch.manual_seed(0)
    vit = tiny_vit(dynamic_img_size=True).train()
    return insert_early_compressor(vit, LAYER) if compressed else vit


def loss(model, rank):
    """Of images of both shapes, different on each rank, that are as many tokens."""
    generator = torch.Generator().manual_seed(rank)
    first, second = (torch.randn(2, 3, *size, generator=generator) for size in ((16, 16), (8, 32)))
    return model(first).square().sum() + model(second).sin().sum()


def averaged_gradients(world):
    """Those of one process for the mean over the ranks."""
    vit = make()
    (sum(loss(vit, rank) for rank in range(world)) / world).backward()
    return {name: p.grad for name, p in vit.named_parameters()}


def assert_averaged(model, expected):
    found = {
        name.removeprefix("module.").replace("_checkpoint_wrapped_module.", ""): p.grad
        for name, p in model.named_parameters()
    }
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        assert_close(full, expected[name], ROUNDINGS)


def shard(vit, mesh):
    for block in vit.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(vit, mesh=mesh)


def check_sharded(rank, world, expected):
    """FSDP2 gives each block new tensors, in forward and again when it is recomputed."""
    mesh = init_device_mesh("cpu", (world,))
    vit = shard(make(), mesh)
    vit.set_grad_checkpointing(True)
    loss(vit, rank).backward()
    assert_averaged(vit, expected)
    for order in ("wrapped, then sharded", "sharded, then wrapped"):
        vit = make()
        if order == "sharded, then wrapped":
            shard(vit, mesh)
        vit.blocks = nn.Sequential(*(checkpoint_wrapper(block) for block in vit.blocks))
        if order == "wrapped, then sharded":
            shard(vit, mesh)
        loss(vit, rank).backward()
        assert_averaged(vit, expected)


def check_data_parallel(rank, expected):
    parallel = DistributedDataParallel(make())
    parallel.module.set_grad_checkpointing(True)
    parallel.zero_grad()
    loss(parallel, rank).backward()
    assert_averaged(parallel, expected)
    assert insert_early_compressor(parallel.module, LAYER) is parallel.module
    remove_early_compressor(parallel.module)


def check_insertion_behind_data_parallel():
    """The reducer would not average the gradients of a compressor that it does not know."""
    for vit, wrapped in ((make(False), "vit"), (make(False), "a model around it")):
        keys = list(vit.state_dict())
        outer = vit if wrapped == "vit" else nn.Sequential(vit)
        parallel = DistributedDataParallel(outer)
        for target in (parallel, parallel.module) if wrapped == "vit" else (parallel, vit):
            for insert in (insert_early_compressor, insert_progressive_compression):
                with pytest.raises(ValueError, match="insert first, and wrap the model then"):
                    insert(target)
        assert list(vit.state_dict()) == keys
        del parallel
        insert_early_compressor(vit, LAYER)  # unwrapped again, it takes one


def work(rank, world, file):
    torch.set_num_threads(1)
    with process_group(rank, world, file):
        expected = averaged_gradients(world)
        check_sharded(rank, world, expected)
        check_data_parallel(rank, expected)


def test_two_ranks(tmp_path):
    spawn(work, (2, tmp_path / "rendezvous"), nprocs=2)


def test_one_rank(tmp_path):
    with process_group(0, 1, tmp_path / "rendezvous"):
        check_sharded(0, 1, averaged_gradients(1))
        check_insertion_behind_data_parallel()
