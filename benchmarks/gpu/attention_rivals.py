# SPDX-License-Identifier: Apache-2.0
"""Window attention as torch's libraries would do it: window-major segments, block masks, Triton."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F

from gpu.cases import Case
from uhd_ops.cli import rivals as eager

FLEX_BLOCK = 128


def sdpa(case: Case, device: torch.device):
    return lambda q, k, v: eager.attention_sdpa(q, k, v, case.grid, case.window)


def matmul(case: Case, device: torch.device):
    return lambda q, k, v: eager.attention_matmul(q, k, v, case.grid, case.window)


def compiled_sdpa(case: Case, device: torch.device):
    return torch.compile(sdpa(case, device), dynamic=False)


def compiled_broadcast(case: Case, device: torch.device):
    def broadcast(q, k, v):
        return eager.attention_broadcast(q, k, v, case.grid, case.window)

    return torch.compile(broadcast, dynamic=False)


def handwritten_triton(case: Case, device: torch.device):
    triton_attention = importlib.import_module("gpu.triton_attention")
    return lambda q, k, v: triton_attention.window_attention(q, k, v, case.grid)


def _on_segments(case: Case, attend):
    """Bring windows together, ``attend`` on ``(N, H, D)``, and put the result back in raster."""
    slots = case.window**2

    def run(q, k, v):
        parts = (eager.split(x, case.grid, case.window).flatten(0, 1) for x in (q, k, v))
        return eager.join(attend(*parts).unflatten(0, (-1, slots)), case.grid, case.window)

    return run


def varlen(case: Case, device: torch.device):
    """Attend with torch's variable-length attention (FlashAttention 2), each window a segment."""
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    slots = case.window**2
    starts = torch.arange(0, case.tokens + 1, slots, dtype=torch.int32, device=device)
    return _on_segments(case, lambda q, k, v: varlen_attn(q, k, v, starts, starts, slots, slots))


def _block_mask(case: Case, device: torch.device):
    """Build the mask of "in the same window" from its blocks: no N x N tensor is evaluated."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    slots, tokens = case.window**2, case.tokens
    blocks = -(-tokens // FLEX_BLOCK)
    span = max(1, slots // FLEX_BLOCK)  # blocks of keys that one block of queries sees
    first = torch.arange(blocks, device=device) // span * span
    seen = (first[:, None] + torch.arange(span, device=device)).to(torch.int32)
    # Every row lists all blocks; the count says how many of the list are meant.
    rest = torch.zeros(blocks, blocks - span, dtype=torch.int32, device=device)
    indices = torch.cat([seen, rest], 1)[None, None]
    counts = torch.full((1, 1, blocks), span, dtype=torch.int32, device=device)

    def same_window(batch, head, query, key):
        return query // slots == key // slots

    return flex.BlockMask.from_kv_blocks(
        counts, indices, BLOCK_SIZE=FLEX_BLOCK, mask_mod=same_window, seq_lengths=(tokens, tokens)
    )


def _flex(case: Case, device: torch.device, attention):
    mask = _block_mask(case, device)

    def attend(q, k, v):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return attention(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return _on_segments(case, attend)


def flex(case: Case, device: torch.device):
    """flex_attention, compiled, on window-major tokens with a block mask made by hand."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    return _flex(case, device, torch.compile(module.flex_attention, dynamic=False))


def flex_uncompiled(case: Case, device: torch.device):
    """Return the same without a compiler: slow, to check the maths where there is no GPU."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    return _flex(case, device, module.flex_attention)


def window_major_sdpa(case: Case, device: torch.device):
    """SDPA on tokens that are window-major already: another function, the floor of SDPA."""
    slots = case.window**2

    def run(q, k, v):
        q, k, v = (x.unflatten(0, (-1, slots)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

    return run
