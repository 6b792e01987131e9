# SPDX-License-Identifier: Apache-2.0
"""
A ratio for each view
=====================

Not every slice is worth the same number of tokens. ``choose_ratios`` merges the views with the
lowest scores first, until all together meet a budget; a score may be anything, such as how much the
pixels of a view differ.
"""

import matplotlib.pyplot as plt
import timm
import torch

import uhd_ops

torch.manual_seed(0)
image = uhd_ops.load_image("../../examples/images/picos_de_europa.jpg")
plan = uhd_ops.plan_slices(*image.size, scale_resolution=224, patch_size=16)
pixels, grids = uhd_ops.pack_views(uhd_ops.slice_image(image, plan), patch_size=16)

# %%
# Half of what merging every view once would leave.
scores = uhd_ops.nn.token_variance(pixels, grids)
ratios = uhd_ops.nn.choose_ratios(scores, grids, max_tokens=plan.num_tokens // 8)
uhd_ops.plot.ratios(image, plan, ratios)
plt.show()

# %%
# The encoder takes the ratios beside the views, and every view has its own number of tokens.
vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
vit = uhd_ops.insert_early_compressor(vit.eval(), layer=3)
with torch.inference_mode():
    result = uhd_ops.nn.SliceEncoder(vit)(pixels, grids, ratios=ratios)
print([len(view) for view in result.per_view()])
