# SPDX-License-Identifier: Apache-2.0
"""Insert the early compressor into a timm ViT, see what it saves block by block, take it out again.

Run: python examples/02_retrofit_timm_vit.py [MODEL]
"""

import contextlib
import statistics
import sys
import time

import timm
import torch

import uhd_ops

LAYER = 2  # of 12 blocks, about as deep as layer 6 of the paper's 27


@contextlib.contextmanager
def record(blocks):
    """Yield a list that receives (tokens out, seconds) of every block that runs."""
    rows, started = [], []

    def start(block, inputs):
        started.append(time.perf_counter())

    def stop(block, inputs, output):
        rows.append((output.shape[1], time.perf_counter() - started.pop()))

    hooks = [block.register_forward_pre_hook(start) for block in blocks]
    hooks += [block.register_forward_hook(stop) for block in blocks]
    yield rows
    for hook in hooks:
        hook.remove()


def run(vit, image, passes=5):
    """Return the tokens, and (tokens out, median seconds) of every block."""
    recorded = []
    with torch.inference_mode():
        for _ in range(1 + passes):  # the first one warms up
            with record(vit.blocks) as rows:
                tokens = vit.forward_features(image)
            recorded.append(rows)
    per_block = zip(*recorded[1:], strict=True)
    rows = [(block[0][0], statistics.median(s for _, s in block)) for block in per_block]
    return tokens, rows


name = sys.argv[1] if len(sys.argv) > 1 else "vit_small_patch16_224"
torch.manual_seed(0)
vit = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()  # random weights
image = torch.randn(1, 3, 448, 448)
keys = set(vit.state_dict())
grid = vit.patch_embed.dynamic_feat_size(image.shape[-2:])

before, rows_before = run(vit, image)
macs_before = uhd_ops.flops.of_vit(vit, [grid]).giga

uhd_ops.insert_early_compressor(vit, LAYER)
after, rows_after = run(vit, image)
macs_after = uhd_ops.flops.of_vit(vit, [grid]).giga
assert keys < set(vit.state_dict())  # checkpoints of the plain model still load

print(f"{name}, random weights, grid {grid[0]}x{grid[1]}, compressor after layer {LAYER}")
print(f"{'block':>5}{'tokens':>9}{'ms':>8}   |{'tokens':>9}{'ms':>8}   with the compressor")
for index, rows in enumerate(zip(rows_before, rows_after, strict=True)):
    cells = (f"{tokens:>9}{1e3 * seconds:>8.1f}" for tokens, seconds in rows)
    print(f"{index:>5}{'   |'.join(cells)}{'   <- compressor' if index == LAYER else ''}")
totals = (f"{1e3 * sum(s for _, s in rows):>17.1f}" for rows in (rows_before, rows_after))
print(f"{'sum':>5}{'   |'.join(totals)}")
print(f"tokens out: {tuple(before.shape)} -> {tuple(after.shape)}")
print(f"GMACs: {macs_before:.2f} -> {macs_after:.2f}")

uhd_ops.remove_early_compressor(vit)
again, _ = run(vit, image)
print(f"removed; the model is what it was, bit for bit: {torch.equal(before, again)}")
assert torch.equal(before, again)
assert keys == set(vit.state_dict())
