# SPDX-License-Identifier: Apache-2.0
"""
The tokens of a merge
=====================

What the compressor gets from the block in front of it, and what it hands on: a quarter of the
tokens. The weights are random here, so that the pictures show where the image differs, not what a
trained model finds in it.
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
# A hook on the compressor keeps what enters and what leaves it.
seen = {}
vit.blocks[3].compressor.register_forward_hook(
    lambda module, inputs, output: seen.update(before=inputs[0], after=output)
)
with torch.inference_mode():
    uhd_ops.nn.SliceEncoder(vit)(pixels, grids)
print(tuple(seen["before"].shape), "to", tuple(seen["after"].shape))

# %%
# The norm of each token, in its place.
uhd_ops.plot.merge(seen["before"], seen["after"], grids, plan, image=image)
plt.show()

# %%
# The first three principal components of the tokens as red, green and blue. Both maps have the same
# components: equal colours are equal content.
uhd_ops.plot.merge(seen["before"], seen["after"], grids, plan, show="pca")
plt.show()
