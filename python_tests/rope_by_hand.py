# SPDX-License-Identifier: Apache-2.0
"""What families with rotary embeddings must compute, as loops over windows and blocks."""

import copy

import torch
from families.case import merge_batch, mlp_mean, window_slots

# timm rounds its tables to float32, whatever the dtype of the model. The middle of two such entries
# is defined to that precision; an entry takes part in two products of a score, queries and keys in
# three blocks have them, and a softmax of scores of order 1 does not magnify their errors.
ROUNDINGS = 2 * 2 * 3 * torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps


def merge_rope(rope, grid, window, positions):
    """Give merged tokens their rows of ``rope (..., N, 2 D)``: a loop over windows."""
    sin, cos = rope.double().chunk(2, -1)
    angle = torch.complex(cos, sin)
    height, width = grid
    merged = []
    for number, (present, _) in enumerate(window_slots(height, width, window)):
        if positions == "reindex":
            row, column = divmod(number, -(-width // window))
            middle = angle[..., row * width + column, :]
        else:
            rows, columns = ({index // width for index in present}, {i % width for i in present})
            central = [i * width + j for i in _central(rows) for j in _central(columns)]
            middle = angle[..., central, :].mean(-2)
            middle = middle / middle.abs()
        merged.append(torch.cat([middle.imag, middle.real], -1))
    return torch.stack(merged, -2)


def _central(indices):
    """The middle one of some indices, or the middle two."""
    ordered = sorted(indices)
    return {ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]}


def merge(block, tokens, grid, prefix, window, attention, rope):
    """The compressor made of a pre-norm or post-norm block with rotary embeddings."""
    attn = copy.deepcopy(block.attn)
    attn.num_prefix_tokens = 0
    post_norm = type(block).__name__ == "EvaBlockPostNorm"
    gammas = [getattr(block, name, None) for name in ("gamma_1", "gamma_2")]
    gammas = [1.0 if gamma is None else gamma for gamma in gammas]

    def attend(x, present):
        rows = None if rope is None else rope[..., present, :]
        if post_norm:
            return block.norm1(attn(x[None], rope=rows))[0]
        return gammas[0] * attn(block.norm1(x[None]), rope=rows)[0]

    def mlp(z):
        if post_norm:
            return block.norm2(mlp_mean(None, block.mlp, z))
        return gammas[1] * mlp_mean(block.norm2, block.mlp, z)

    return merge_batch(tokens, grid, prefix, window, attend if attention else None, mlp)


def run_blocks(blocks, tokens, rope, grid, prefix, layer, window, positions, attention):
    """Run all blocks, the compressor behind one; ``rope`` may have a first dimension of blocks."""
    outs = []
    for index, block in enumerate(blocks):
        own = rope[index] if rope is not None and rope.dim() == 4 else rope
        coarse = own if own is None or index <= layer else merge_rope(own, grid, window, positions)
        tokens = block(tokens, rope=coarse)
        if index == layer:
            tokens = merge(block, tokens, grid, prefix, window, attention, own)
        outs.append(tokens)
    return outs
