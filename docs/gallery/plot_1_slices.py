# SPDX-License-Identifier: Apache-2.0
"""
Slices and windows on the image
===============================

A large image is cut into slices that the encoder can take, beside a thumbnail of the whole. Inside
the encoder, each window of 2 x 2 patches becomes one token.
"""

import matplotlib.pyplot as plt

import uhd_ops

image = uhd_ops.load_image("../../examples/images/picos_de_europa.jpg")
plan = uhd_ops.plan_slices(*image.size, scale_resolution=448, patch_size=14)
print(plan)

# %%
# The slices, and the windows in them. No window is cut in two: the sides of slices are multiples of
# four patches, for two merges.
uhd_ops.plot.views(image, plan, window=2)
plt.show()

# %%
# With ``overlap``, neighbouring slices share patches, so that nothing stands at a border only. What
# that costs is part of the plan.
overlapping = uhd_ops.plan_slices(*image.size, scale_resolution=448, patch_size=14, overlap=4)
print(overlapping.num_overlap_tokens, "of", overlapping.num_tokens, "tokens are there twice")
uhd_ops.plot.views(image, overlapping)
plt.show()

# %%
# ``plan_native`` makes one view of the image at its own resolution, or of as many patches as a
# budget allows.
native = uhd_ops.plan_native(*image.size, max_tokens=4096, patch_size=14)
uhd_ops.plot.views(image, native, window=2)
plt.show()
