# SPDX-License-Identifier: Apache-2.0
"""
The cost over resolution
========================

What encoding costs as images grow, counted from sizes alone: sliced or whole, with compressors and
without. The encoder has the sizes of SigLIP-SO400M.
"""

import matplotlib.pyplot as plt

import uhd_ops
from uhd_ops import flops

SIDES = range(224, 2241, 112)


def line(compressor, plan):
    """Points of side and multiply-accumulates."""
    return [
        (side, flops.count_vit(flops.SIGLIP_SO400M, plan(side, side).grids, compressor).total)
        for side in SIDES
    ]


early = flops.CompressorConfig(layers=6)
tied = flops.CompressorConfig(layers=6, form="tied")
progressive = flops.CompressorConfig(layers=(3, 17), pool="adaptive")

# %%
# Slices keep attention short: their cost grows with the area until there are nine of them, and no
# further, because more than nine are not cut. In one view at native resolution every patch attends
# to all others, up to the budget of 16384 patches where the line turns flat.
uhd_ops.plot.costs(
    {
        "whole image": line(None, uhd_ops.plan_native),
        "slices": line(None, uhd_ops.plan_slices),
        "slices, early compressor": line(early, uhd_ops.plan_slices),
        "slices, progressive": line(progressive, uhd_ops.plan_slices),
    }
)
plt.show()

# %%
# Layer by layer, for one slice: what stands in front of the compressor is paid in full, so it
# should be little. In its dense form the compressor costs more than a block; the tied form starts
# as the same function, and costs less.
grids = [(32, 32)]
without = flops.count_vit(flops.SIGLIP_SO400M, grids)
for config in (early, tied):
    uhd_ops.plot.layers(flops.count_vit(flops.SIGLIP_SO400M, grids, config), without)
plt.show()

# %%
# What is saved depends on the layer.
choices = (0, 3, 6, 12, 20)
saved = {
    form: [
        100 * (1 - flops.count_vit(flops.SIGLIP_SO400M, grids, config).total / without.total)
        for config in (flops.CompressorConfig(layers=layer, form=form) for layer in choices)
    ]
    for form in ("dense", "block", "tied")
}
axes = uhd_ops.plot.bars([f"after layer {layer}" for layer in choices], saved)
axes.set_xlabel("saved, %")
plt.show()
