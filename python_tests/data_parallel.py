# SPDX-License-Identifier: Apache-2.0
"""Checks for two ranks that each see their own images: DDP, FSDP2, HSDP, checkpoints of DCP."""

import pytest
import torch
from families.case import assert_close
from families.vision_transformer import make as tiny_vit
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from uhd_ops import (
    PackedGrids,
    freeze_for_stage,
    insert_early_compressor,
    insert_progressive_compression,
    remove_early_compressor,
)
from uhd_ops.nn import PixelUnshuffleConnector, SliceEncoder, ViewShares, param_groups

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


def averaged_gradients(world, vit=None):
    """Those of one process for the mean over the ranks."""
    vit = make() if vit is None else vit
    (sum(loss(vit, rank) for rank in range(world)) / world).backward()
    return {name: p.grad for name, p in vit.named_parameters()}


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_averaged(model, expected):
    found = {
        name.removeprefix("module.").replace("_checkpoint_wrapped_module.", ""): p.grad
        for name, p in model.named_parameters()
    }
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if expected[name] is None:
            assert gradient is None
        else:
            assert_close(full(gradient), expected[name], ROUNDINGS)


def shard(vit, mesh):
    for block in vit.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(vit, mesh=mesh)


def check_sharded(rank, world, folder):
    """FSDP2 gives each block new tensors, in forward and again when it is recomputed."""
    expected = averaged_gradients(world)
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


def check_hybrid_sharded(rank, world, folder):
    """HSDP: replicas in one dimension of the mesh, shards in the other."""
    expected = averaged_gradients(world)
    for shape in ((1, world), (world, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        vit = shard(make(), mesh)
        vit.set_grad_checkpointing(True)
        loss(vit, rank).backward()
        assert_averaged(vit, expected)


def check_data_parallel(rank, world, folder):
    parallel = DistributedDataParallel(make())
    parallel.module.set_grad_checkpointing(True)
    parallel.zero_grad()
    loss(parallel, rank).backward()
    assert_averaged(parallel, averaged_gradients(world))
    assert insert_early_compressor(parallel.module, LAYER) is parallel.module
    remove_early_compressor(parallel.module)


def check_stages(rank, world, folder):
    """A step on groups of sharded parameters is that of one process; frozen ones stay."""
    mesh = init_device_mesh("cpu", (world,))
    for stage in (1, 2):
        alone = freeze_for_stage(make(), stage)
        averaged_gradients(world, alone)
        for order in ("frozen, then sharded", "sharded, then frozen"):
            vit = make()
            if order == "frozen, then sharded":
                freeze_for_stage(vit, stage)
            shard(vit, mesh)
            if order == "sharded, then frozen":
                freeze_for_stage(vit, stage)
            loss(vit, rank).backward()
            assert_averaged(vit, {name: p.grad for name, p in alone.named_parameters()})
            rates = {"compressor": 0.5} if stage == 1 else {"compressor": 0.5, "tower": 0.25}
            groups = param_groups(vit, stage, rates=rates, no_decay=True)
            of_alone = param_groups(alone, stage, rates=rates, no_decay=True)
            assert [group["name"] for group in groups] == [group["name"] for group in of_alone]
            before = {name: full(p.detach()).clone() for name, p in vit.named_parameters()}
            torch.optim.SGD(groups, weight_decay=0.5).step()
            for group, other in zip(groups, of_alone, strict=True):
                decay = group.get("weight_decay", 0.5)
                for found, p in zip(group["params"], other["params"], strict=True):
                    stepped = p.detach() - group["lr"] * (p.grad + decay * p.detach())
                    assert_close(full(found.detach()), stepped, ROUNDINGS)
            for name, p in vit.named_parameters():
                assert torch.equal(full(p.detach()), before[name]) is (not p.requires_grad), name


# ---- checkpoints of torch.distributed.checkpoint, across numbers of ranks ------------------------


def train_state(mesh=None):
    """A model in stage 2 and its optimizer; sharded where there is a mesh."""
    vit = freeze_for_stage(make(), 2)
    vit = vit if mesh is None else shard(vit, mesh)
    return vit, torch.optim.AdamW(param_groups(vit, 2, no_decay=True))


def state_of(vit, optimizer):
    model, state = get_state_dict(vit, optimizer)
    return {"model": model, "optimizer": state}


def flat(state):
    """Every tensor and number of a state, whole, by its path."""
    if isinstance(state, dict):
        return {(k, *path): x for k, v in state.items() for path, x in flat(v).items()}
    if isinstance(state, list | tuple):
        return flat(dict(enumerate(state)))
    return {(): full(state).clone() if isinstance(state, torch.Tensor) else state}


def save(folder, vit, optimizer):
    """Save it as a checkpoint, and whole beside it."""
    state = state_of(vit, optimizer)
    checkpoint.save(state, checkpoint_id=str(folder))
    torch.save(flat(state), folder / "whole.pt")


def assert_loads(folder, vit, optimizer):
    """A checkpoint loads into fresh state: the same bits."""
    expected = torch.load(folder / "whole.pt", weights_only=True)
    state = state_of(vit, optimizer)
    checkpoint.load(state, checkpoint_id=str(folder))
    model, of_optimizer = state["model"], state["optimizer"]
    set_state_dict(vit, optimizer, model_state_dict=model, optim_state_dict=of_optimizer)
    found = flat(state_of(vit, optimizer))
    assert found.keys() == expected.keys()
    assert any("exp_avg" in path for path in found)
    for path, value in found.items():
        same = torch.equal if isinstance(value, torch.Tensor) else type(value).__eq__
        assert same(value, expected[path]), path


def save_alone(folder):
    """One process saves what two ranks load."""
    vit, optimizer = train_state()
    loss(vit, 0).backward()
    optimizer.step()
    (folder / "one").mkdir()
    save(folder / "one", vit, optimizer)


def check_checkpoints(rank, world, folder):
    """Two ranks load what one process saved, train on, and save what it loads."""
    vit, optimizer = train_state(init_device_mesh("cpu", (world,)))
    assert_loads(folder / "one", vit, optimizer)
    loss(vit, rank).backward()
    optimizer.step()
    (folder / "two").mkdir(exist_ok=True)
    save(folder / "two", vit, optimizer)


def load_alone(folder):
    """One process loads what two ranks saved."""
    assert_loads(folder / "two", *train_state())


# ---- views of one sequence on several ranks ------------------------------------------------------


class Encoder(nn.Module):
    """A compressed tower and a connector, and the loss of what a language model would read."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        vit = tiny_vit(dynamic_img_size=True, num_classes=0).train()
        self.encoder = SliceEncoder(insert_early_compressor(vit, LAYER))
        self.connector = PixelUnshuffleConnector(32, 24)

    def forward(self, pixels, grids):
        result = self.encoder(pixels, grids)
        return self.connector(result.tokens, result.grids)


def read(tokens, rank=0):
    """A loss that sees the order of the tokens."""
    weights = torch.arange(1.0, tokens.numel() + 1).view_as(tokens) / tokens.numel()
    return (tokens * weights).sin().sum() * (rank + 1)


def check_views_over_ranks(rank, world, folder):
    """Each rank encodes its own views; the loss after them is one, or each rank's own."""
    mixed = [(4, 6), (3, 5), (8, 2), (5, 5)]
    for pairs, alike in ((mixed, True), (mixed, False), ([(4, 4)], True), ([], True)):
        grids = PackedGrids(pairs)
        pixels = torch.randn(grids.num_tokens, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        ranks = [0] * world if alike else range(world)
        alone = Encoder()
        expected = alone(pixels, grids)
        (sum(read(expected, number) for number in ranks) / world).backward()
        shares = ViewShares(grids)
        assert [pair for run in shares.grids for pair in run] == pairs
        assert shares.own == shares.grids[rank]
        counts = [run.num_tokens for run in shares.grids]
        assert max(counts) - min(counts) <= max([h * w for h, w in pairs], default=0)
        parallel = DistributedDataParallel(Encoder())
        tokens = shares.gather(parallel(shares.take(pixels), shares.own), window=4)
        if pairs:
            assert_close(tokens.detach(), expected.detach(), ROUNDINGS)
        else:
            assert tokens.shape == expected.shape == (0, 24)
        read(tokens, ranks[rank]).backward()
        for found, p in zip(parallel.module.parameters(), alone.parameters(), strict=True):
            assert_close(found.grad, p.grad, ROUNDINGS)


def check_wrong_shares(rank, world, folder):
    """What one rank is given wrong is refused before any other waits for it."""
    grids = PackedGrids([(4, 6), (3, 5)])
    shares = ViewShares(grids)
    with pytest.raises(ValueError, match=r"packed must have 39 rows, got shape \(38, 2\)"):
        shares.take(torch.zeros(38, 2))
    with pytest.raises(TypeError, match=r"packed must be a torch\.Tensor, got list"):
        shares.take([0.0] * 39)
    rows = shares.own.num_windows(2)
    for wrong in (torch.zeros(rows + 1, 2), torch.zeros(())):
        with pytest.raises(ValueError, match=f"tokens must have {rows} rows, got shape"):
            shares.gather(wrong, window=2)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        shares.gather(torch.zeros(rows, 2), window=0)
    first = distributed.new_group([0])
    if rank == 0:
        assert ViewShares(grids, first).own == grids
    else:
        with pytest.raises(RuntimeError, match="this process must be in group"):
            ViewShares(grids, first)


# ---- without a second rank -----------------------------------------------------------------------


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


CHECKS = {
    "FSDP2": check_sharded,
    "HSDP": check_hybrid_sharded,
    "DDP": check_data_parallel,
    "stages": check_stages,
    "DCP": check_checkpoints,
    "views": check_views_over_ranks,
    "wrong shares": check_wrong_shares,
}
