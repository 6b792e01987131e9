# SPDX-License-Identifier: Apache-2.0
"""
Attention inside windows
========================

Before a window of tokens becomes one, its tokens attend to each other, and to nothing else. The map
shows how much each token gets from the queries of its window, the matrices the weights of one
window, head by head.
"""

import matplotlib.pyplot as plt
import timm
import torch

import uhd_ops

torch.manual_seed(0)
image = uhd_ops.load_image("../../examples/images/picos_de_europa.jpg")
plan = uhd_ops.plan_slices(*image.size, scale_resolution=224, patch_size=16)
pixels, grids = uhd_ops.pack_views(uhd_ops.slice_image(image, plan), patch_size=16)
vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
vit = uhd_ops.insert_early_compressor(vit.eval(), layer=3)

# %%
# Queries and keys are those of the compressor's own attention.
compressor = vit.blocks[3].compressor
seen = {}
compressor.register_forward_hook(lambda module, inputs, output: seen.update(tokens=inputs[0]))
with torch.inference_mode():
    uhd_ops.nn.SliceEncoder(vit)(pixels, grids)
    attn = compressor.attn
    qkv = attn.qkv(attn.norm(seen["tokens"])).unflatten(1, (3, attn.num_heads, attn.head_dim))
q, k, _ = qkv.unbind(1)

# %%
# Random weights attend almost evenly. The scores are made 16 times as large here to show something;
# with trained weights, leave ``scale`` out.
scale = 16 * attn.head_dim**-0.5
uhd_ops.plot.attention(q, k, grids, plan, scale=scale)
plt.show()

# %%
# The same in windows of 4 x 4 tokens, looking at one of the third slice.
uhd_ops.plot.attention(q, k, grids, plan, window=4, at=(3, 1, 2), scale=scale)
plt.show()
