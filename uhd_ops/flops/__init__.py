# SPDX-License-Identifier: Apache-2.0
"""What a vision transformer costs, with and without the early compressor, layer by layer.

Two ways of counting:

* ``"macs"``: multiply-accumulates of the matrix products, and nothing else; half of what PyTorch's
  ``FlopCounterMode`` reports. A window attends to its own tokens.
* ``"paper"``: the counting that reproduces the tables of LLaVA-UHD v4: the same products plus a few
  operations per element of scores, norms, activations and residuals, and the window attention
  counted as if it were full attention.

Example:
    >>> from uhd_ops import flops
    >>> compressor = flops.CompressorConfig(layer=6)
    >>> round(flops.count_vit(flops.SIGLIP_SO400M, [(70, 70)], compressor).giga, 1)
    1502.5
    >>> paper = flops.count_vit(flops.SIGLIP_SO400M, [(70, 70)], compressor, counting="paper")
    >>> round(paper.giga, 1)
    1573.1
"""

from uhd_ops.flops.config import SIGLIP_SO400M, CompressorConfig, ViTConfig
from uhd_ops.flops.count import count_vit
from uhd_ops.flops.report import FlopReport, LayerCount
from uhd_ops.flops.timm_vit import compressor_config, of_vit, vit_config

__all__ = [
    "SIGLIP_SO400M",
    "CompressorConfig",
    "FlopReport",
    "LayerCount",
    "ViTConfig",
    "compressor_config",
    "count_vit",
    "of_vit",
    "vit_config",
]
