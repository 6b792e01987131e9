# SPDX-License-Identifier: Apache-2.0
"""The operators inside a model that is not ours, as in an inference engine.

The engine has packed tokens, a list of (h, w) grids, its own layers, weights, rotary embedding and
attention kernel. Layer 1 of 3 becomes the early compressor: its attention is restricted to 2x2
windows, and its MLP makes one token of each window. No module class of this library is needed.

Run: python examples/03_ops_in_your_model.py
"""

import torch
from torch.nn import functional

import uhd_ops

HEADS, HEAD_DIM, HIDDEN = 4, 16, 128
CHANNELS = HEADS * HEAD_DIM


# ---- the engine's code: nothing here knows of uhd_ops


class Layer(torch.nn.Module):
    """A pre-norm layer on packed tokens ``(N, C)`` with 2-D rotary embedding."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(CHANNELS), torch.nn.LayerNorm(CHANNELS)
        self.qkv = torch.nn.Linear(CHANNELS, 3 * CHANNELS)
        self.proj = torch.nn.Linear(CHANNELS, CHANNELS)
        self.fc1 = torch.nn.Linear(CHANNELS, HIDDEN)
        self.fc2 = torch.nn.Linear(HIDDEN, CHANNELS)

    def heads(self, x, coordinates):
        q, k, v = self.qkv(self.norm1(x)).unflatten(1, (3, HEADS, HEAD_DIM)).unbind(1)
        return rotate(q, coordinates), rotate(k, coordinates), v

    def forward(self, x, coordinates, cu_seqlens):
        mixed = varlen_attention(*self.heads(x, coordinates), cu_seqlens)
        x = x + self.proj(mixed.flatten(1))
        hidden = functional.gelu(self.fc1(self.norm2(x)), approximate="tanh")
        return x + self.fc2(hidden)


def rotate(x, coordinates):
    """Rotate half of the channels by the row, half by the column of each token."""
    frequencies = 10000.0 ** -torch.linspace(0, 1, HEAD_DIM // 4, dtype=x.dtype)
    angles = (coordinates.to(x.dtype)[..., None] * frequencies).flatten(1)[:, None]
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def varlen_attention(q, k, v, cu_seqlens):
    """Stand in for the engine's variable-length attention kernel."""
    lengths = cu_seqlens.diff().tolist()
    segments = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
    mixed = [functional.scaled_dot_product_attention(*segment) for segment in segments]
    return torch.cat(mixed, 1).transpose(0, 1)


# ---- what to add: four calls of operators, on the engine's weights


def encode(layers, x, grids, order="raster", ops=uhd_ops):
    """Encode packed tokens of any token order; return merged tokens in raster order."""
    # Grids are Python integers of the preprocessor: nothing waits for the device. Make the object
    # once for a batch; it keeps its index tables.
    grids = uhd_ops.PackedGrids(grids)
    coordinates = uhd_ops.reorder_tokens(grids.coordinates(x.device), grids, order)
    x = layers[0](x, coordinates, grids.cu_seqlens(x.device))

    layer = layers[1]
    q, k, v = layer.heads(x, coordinates)  # rotated by the engine; slices of qkv would do as well
    mixed = ops.window_attention(q, k, v, grids, order_in=order, order=order)
    x = x + layer.proj(mixed.flatten(1))
    x = ops.pixel_unshuffle_mlp(
        x,
        grids,
        layer.fc1.weight,  # (I, C): the tied form, one FFN for all four tokens of a window
        layer.fc1.bias,
        layer.fc2.weight,
        layer.fc2.bias,
        norm_weight=ops.tile_vector(layer.norm2.weight, 4),
        norm_bias=ops.tile_vector(layer.norm2.bias, 4),
        eps=layer.norm2.eps,
        order_in=order,
    )
    # Merged tokens stand at the centres of their windows. grids.merged().coordinates() would number
    # them anew instead.
    coordinates = ops.window_mean(coordinates, grids, order_in=order)
    grids = grids.merged(2)
    return layers[2](x, coordinates, grids.cu_seqlens(x.device)), grids


torch.manual_seed(0)
layers = torch.nn.ModuleList(Layer() for _ in range(3)).requires_grad_(False)
grids = [(8, 12), (5, 7)]  # two views; the right and bottom windows of the second are ragged
x = torch.randn(8 * 12 + 5 * 7, CHANNELS)

tokens, merged = encode(layers, x, grids)
print(f"tokens: {len(x)} -> {len(tokens)}, grids: {grids} -> {list(merged)}")
print(f"cu_seqlens of the merged tokens: {merged.cu_seqlens().tolist()}")

# The same with the definitions of the operators in plain PyTorch, in float64.
expected, _ = encode(layers.double(), x.double(), grids, ops=uhd_ops.reference)
error = (tokens - expected).abs().max().item()
print(f"largest difference from the float64 definitions: {error:.1e}")
assert error < 1e-5

# Qwen's processors return tokens in 2x2-block-major order: say so, and no token is moved. A window
# is four rows then, one after the other.
blocks = uhd_ops.reorder_tokens(x, grids, "block")
from_blocks, _ = encode(layers.float(), blocks, grids, order="block")
error = (from_blocks - expected).abs().max().item()
print(f"block-major tokens, largest difference: {error:.1e}")
assert error < 1e-5
