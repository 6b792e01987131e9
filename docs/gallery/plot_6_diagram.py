# SPDX-License-Identifier: Apache-2.0
"""
Slice, pack, compress
=====================

The whole way of an image through the encoder, with the numbers of tokens and what each block costs.
"""

import matplotlib.pyplot as plt

import uhd_ops
from uhd_ops import flops

image = uhd_ops.load_image("../../examples/images/picos_de_europa.jpg")
plan = uhd_ops.plan_slices(*image.size)

# %%
# LLaVA-UHD v4: one compressor behind an early layer of SigLIP-SO400M.
uhd_ops.plot.diagram(image, plan)
plt.show()

# %%
# LLaVA-UHD v3: two poolings, deeper in the encoder.
uhd_ops.plot.diagram(image, plan, compressor=flops.CompressorConfig((3, 17), pool="adaptive"))
plt.show()
