# SPDX-License-Identifier: Apache-2.0
"""Checks for two ranks that share each tensor: operators on DTensors, layers split by torch."""

import copy

import pytest
import torch
from families.case import assert_close
from families.vision_transformer import make as tiny_vit
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import uhd_ops
from uhd_ops import PackedGrids, insert_early_compressor
from uhd_ops.nn import (
    AttentionSpec,
    BlockSpec,
    CompressorConfig,
    EarlyCompressor,
    MlpSpec,
    PixelUnshuffleConnector,
    WindowTokenCompressor,
)

GRIDS = PackedGrids([(4, 6), (3, 5)])
N = GRIDS.num_tokens
ROUNDINGS = 12 * 512  # as in data_parallel.py


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(call, inputs, placements, expected_placement, mesh, cotangent=None):
    """``call`` of DTensors is that of whole tensors, forward and backward, and stays sharded."""
    alone = [x.clone().requires_grad_() for x in inputs]
    expected = call(*alone)
    grad = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view_as(expected)
    expected.backward(grad)
    pairs = zip(inputs, placements, strict=True)
    everywhere = [Replicate()] * (mesh.ndim - 1)
    sharded = [
        distribute_tensor(x, mesh, [*everywhere, where]).requires_grad_() for x, where in pairs
    ]
    found = call(*sharded)
    assert found.placements == (*everywhere, expected_placement), found.placements
    found.backward(distribute_tensor(grad, mesh, [*everywhere, cotangent or Replicate()]))
    assert_close(full(found.detach()), expected.detach(), ROUNDINGS)
    for x, other in zip(sharded, alone, strict=True):
        assert_close(full(x.grad), other.grad, ROUNDINGS)
    return [x.grad.placements[-1] for x in sharded]


def check_windows_of_channels(rank, world, folder):
    """Channels do not meet in a window's mean; in its unshuffled tokens they move."""
    mesh, (x, logits) = init_device_mesh("cpu", (world,)), tensors((N, 6), (N, 6))
    # Windows of two sides: DTensor keeps what it found out for a call, and must tell them apart.
    for window in (2, 3):
        for order in ("raster", "block", "window"):
            options = {"window": window, "order_in": order}
            compare(
                lambda x, options=options: uhd_ops.window_mean(x, GRIDS, **options),
                [x],
                [Shard(1)],
                Shard(1),
                mesh,
                Shard(1),
            )
        grads = compare(
            lambda *both, window=window: uhd_ops.window_pool(*both, GRIDS, window),
            [x, logits],
            [Shard(1)] * 2,
            Shard(1),
            mesh,
            Shard(1),
        )
        assert grads == [Shard(1)] * 2
        compare(
            lambda x, window=window: uhd_ops.pixel_unshuffle(x, GRIDS, window),
            [x],
            [Shard(1)],
            Replicate(),
            mesh,
        )
    compare(lambda x: uhd_ops.reorder_tokens(x, GRIDS, "block"), [x], [Shard(1)], Shard(1), mesh)
    batch = x[:24].view(2, 12, 6)
    compare(lambda x: uhd_ops.window_mean(x, (3, 4)), [batch], [Shard(2)], Shard(2), mesh)
    # What is linear need not add up partial sums first.
    partial = DTensor.from_local(x * (rank + 1), mesh, [Partial()])
    total = x * sum(range(1, world + 1))
    for call in (uhd_ops.window_mean, uhd_ops.pixel_unshuffle):
        found = call(partial, GRIDS)
        assert found.placements == (Partial(),)
        assert_close(full(found), call(total, GRIDS), ROUNDINGS)


def check_heads(rank, world, folder):
    """Each rank has heads of its own, of queries, keys, values and tables that differ by head."""
    mesh = init_device_mesh("cpu", (world,))
    q, k, v, joint, of_heads = tensors(*[(N, 4, 8)] * 3, (N, 8), (N, 4, 8))
    shards = [Shard(1)] * 3

    def attend(*qkv, **options):
        return uhd_ops.window_attention(*qkv, GRIDS, **options)

    heads = [q, k, v]
    assert compare(attend, heads, shards, Shard(1), mesh) == shards
    compare(attend, heads, [Shard(1), Replicate(), Shard(0)], Shard(1), mesh)
    compare(attend, [q, k[:, :2], v[:, :2]], shards, Shard(1), mesh)
    compare(attend, [q, k[:, :1], v[:, :1]], shards, Replicate(), mesh)  # no head for each rank
    six, three = tensors((N, 6, 8), (N, 3, 8))  # two ranks would have two heads of three
    compare(attend, [six, three, three], shards, Replicate(), mesh)
    odd = [x[:, :3] for x in heads]
    compare(attend, odd, shards, Shard(1), mesh)  # one rank has two heads
    for table in (joint, of_heads):
        for parts in (0, 1):
            compare(
                lambda *qkv, table=table, parts=parts: attend(
                    *qkv, rotary=(table, table.flip(0)), rotate_half=parts
                ),
                heads,
                shards,
                Shard(1),
                mesh,
            )
    for order in ("window", "block"):
        compare(
            lambda *qkv, order=order: attend(*qkv, order=order, order_in="block"),
            heads,
            shards,
            Shard(1),
            mesh,
        )
    packed = torch.stack(heads, 1)
    rotary = joint, joint.flip(0)
    for options in ({}, {"rotary": rotary}):
        compare(
            lambda x, options=options: uhd_ops.window_attention_qkvpacked(x, GRIDS, **options),
            [packed],
            [Shard(2)],
            Shard(1),
            mesh,
        )
    compare(
        lambda x: uhd_ops.window_attention_qkvpacked(x, GRIDS, num_heads=4),
        [torch.cat([q, k[:, :2], v[:, :2]], 1)],
        [Shard(1)],
        Replicate(),
        mesh,
    )
    compare(lambda *qkv: uhd_ops.view_attention(*qkv, GRIDS), heads, shards, Shard(1), mesh)
    batch = [x[:24].view(2, 12, 4, 8) for x in heads]
    compare(
        lambda *qkv: uhd_ops.view_attention(*qkv, (3, 4)), batch, [Shard(2)] * 3, Shard(2), mesh
    )
    # On a mesh with more dimensions, of which one shards.
    compare(attend, heads, shards, Shard(1), init_device_mesh("cpu", (1, world)))


def check_operator_of_the_mlp(rank, world, folder):
    """fc1 by outputs, fc2 by inputs: partial sums, in each of the three forms."""
    mesh, c, hidden = init_device_mesh("cpu", (world,)), 6, 16
    shapes = {
        "dense": ((hidden, 4 * c), (hidden,), (c, hidden)),
        "tied": ((hidden, c), (hidden,), (c, hidden)),
        "block": ((4, hidden, c), (4, hidden), (4, c, hidden)),
    }
    for form, weights in shapes.items():
        dim = 1 if form == "block" else 0
        placements = [Shard(dim), Shard(dim), Shard(dim + 1)]
        grads = compare(
            lambda x, fc1, bias1, fc2, bias2, scale, shift: uhd_ops.pixel_unshuffle_mlp(
                x, GRIDS, fc1, bias1, fc2, bias2, norm_weight=scale, norm_bias=shift
            ),
            tensors((N, c), *weights, (c,), (4 * c,), (4 * c,)),
            [Replicate(), *placements, *[Replicate()] * 3],
            Partial(),
            mesh,
        )
        assert grads[1:4] == placements
    (weight,) = tensors((hidden, c))
    compare(lambda w: uhd_ops.tile_average(w, 4), [weight], [Shard(0)], Shard(0), mesh)
    compare(lambda w: uhd_ops.tile_block_diagonal(w, 4), [weight], [Shard(0)], Replicate(), mesh)


# ---- modules whose layers torch splits -----------------------------------------------------------


def host(fused):
    linear = nn.Linear
    projections = (linear(16, 48),) if fused else tuple(linear(16, 16) for _ in range(3))
    attention = AttentionSpec(
        norm=nn.LayerNorm(16), projections=projections, num_heads=4, head_dim=4, proj=linear(16, 16)
    )
    mlp = MlpSpec(
        norm=nn.LayerNorm(16), fc1=linear(16, 64), fc2=linear(64, 16), activation="gelu_tanh"
    )
    return BlockSpec(16, (attention,), (mlp,))


def compressor(form="dense", fused=True):
    torch.manual_seed(0)
    return EarlyCompressor.from_host(host(fused), CompressorConfig(0, form=form))


def split(module, plan, mesh):
    return parallelize_module(module, mesh, plan)


def assert_split(make, plan, mesh, *arguments):
    """A module with layers split over the ranks computes what it computes alone."""
    alone = make().double()
    module = split(copy.deepcopy(alone), plan(), mesh)
    sharded = {name for name, p in module.named_parameters() if isinstance(p, DTensor)}
    assert {name.rpartition(".")[0] for name in sharded} == plan().keys()
    (x,) = tensors((N, 16))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    results = [m(x, GRIDS) for m, x in zip((alone, module), inputs, strict=True)]
    for result in results:
        result.sin().sum().backward()
    assert_close(results[1].detach(), results[0].detach(), ROUNDINGS)
    assert_close(inputs[1].grad, inputs[0].grad, ROUNDINGS)
    assert_close(gradients(module), gradients(alone), ROUNDINGS)


def gradients(module):
    """All in one: that of a key's bias is nothing but rounding, of what cancels out."""
    return torch.cat([full(p.grad).flatten() for p in module.parameters()])


def mlp_plan(**options):
    return {"mlp.fc1": ColwiseParallel(**options), "mlp.fc2": RowwiseParallel()}


def attention_plan(**options):
    projections = {f"attn.{name}_proj": ColwiseParallel(**options) for name in "qkv"}
    return {**projections, "attn.proj": RowwiseParallel(), **mlp_plan(**options)}


def gathered_plan():
    """The weights of a fused projection are split, its results whole."""
    whole = Replicate()
    return {
        "attn.qkv": ColwiseParallel(output_layouts=whole),
        "attn.proj": RowwiseParallel(input_layouts=whole),
        **mlp_plan(),
    }


def check_modules(rank, world, folder):
    """By local tensors, as torch's styles do unless told otherwise, and by DTensors."""
    mesh = init_device_mesh("cpu", (world,))
    for form in ("dense", "tied"):
        for options in ({}, {"use_local_output": False}):
            assert_split(
                lambda form=form: compressor(form),
                lambda options=options: mlp_plan(**options),
                mesh,
            )
    for options in ({}, {"use_local_output": False}):
        assert_split(
            lambda: compressor(fused=False),
            lambda options=options: attention_plan(**options),
            mesh,
        )
    assert_split(compressor, gathered_plan, mesh)
    layers = ColwiseParallel, RowwiseParallel
    for make, names in (
        (lambda: PixelUnshuffleConnector(16, 24), ("stages.0.fc1", "stages.0.fc2")),
        (trained_pooling, ("fc1", "fc2")),
    ):
        assert_split(
            make,
            lambda names=names: {n: cls() for n, cls in zip(names, layers, strict=True)},
            mesh,
        )


def trained_pooling():
    """As after some steps: at the start the second layer is zero."""
    torch.manual_seed(0)
    module = WindowTokenCompressor(16)
    nn.init.normal_(module.fc2.weight)
    return module


def check_what_cannot_be_split(rank, world, folder):
    """Errors, not other numbers."""
    mesh = init_device_mesh("cpu", (world,))
    with pytest.raises(NotImplementedError, match=r"only support nn\.Linear"):
        split(compressor("block"), mlp_plan(), mesh)
    for local in (True, False):
        plan = {"attn.qkv": ColwiseParallel(use_local_output=local), "attn.proj": RowwiseParallel()}
        module = split(compressor().double(), plan, mesh)
        with pytest.raises(RuntimeError, match=r"unflatten|split the sharded dim"):
            module(*tensors((N, 16)), GRIDS)


def check_tower_split_and_sharded(rank, world, folder):
    """A tower of timm: the MLP is split over one dimension of the mesh, FSDP2 has the other."""

    def make():
        torch.manual_seed(0)
        return insert_early_compressor(tiny_vit(), 1).double()

    (images,) = tensors((2, 3, 28, 28))
    alone = make()
    alone(images).sin().sum().backward()
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("shard", "split"))
    plan = {f"blocks.1.compressor.{name}": style for name, style in mlp_plan().items()}
    vit = split(make(), plan, mesh["split"])
    for block in vit.blocks:
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(vit, mesh=mesh["shard"])
    vit(images).sin().sum().backward()
    assert_close(gradients(vit), gradients(alone), ROUNDINGS)


def check_compiled(rank, world, folder):
    """One graph, whether DTensor knew the rules before or not."""

    def attend(*qkv):
        return uhd_ops.window_attention(*qkv, GRIDS)

    mesh = init_device_mesh("cpu", (world,))
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    shards = [Shard(1)] * 3
    compare(compiled, tensors(*[(N, 4, 8)] * 3), shards, Shard(1), mesh)


CHECKS = {
    "channels": check_windows_of_channels,
    "heads": check_heads,
    "MLP": check_operator_of_the_mlp,
    "modules": check_modules,
    "refusals": check_what_cannot_be_split,
    "tower": check_tower_split_and_sharded,
}
