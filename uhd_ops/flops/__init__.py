# SPDX-License-Identifier: Apache-2.0
"""What a vision transformer costs, with and without compressors, layer by layer.

Three ways to a count: :func:`count_vit` from sizes alone, for planning and for the papers' tables;
:func:`of_vit` for a model, by the grids of the views it is to encode; :func:`count_forward` for any
module and input. And two ways of counting:

* ``"macs"``: multiply-accumulates of the matrix products, and nothing else; half of what PyTorch's
  ``FlopCounterMode`` reports. A window attends to its own tokens.
* ``"paper"``: the counting that reproduces the tables of LLaVA-UHD v4: the same products plus a few
  operations per element of scores, norms, activations and residuals, and the window attention
  counted as if it were full attention.

Example:
    >>> from uhd_ops import flops
    >>> compressor = flops.CompressorConfig(layers=6)
    >>> round(flops.count_vit(flops.SIGLIP_SO400M, [(70, 70)], compressor).giga, 1)
    1502.5
    >>> paper = flops.count_vit(flops.SIGLIP_SO400M, [(70, 70)], compressor, counting="paper")
    >>> round(paper.giga, 1)
    1573.1
"""

from uhd_ops.flops.count import (
    SIGLIP_SO400M,
    ConnectorConfig,
    FlopReport,
    LayerCount,
    ViTConfig,
    count_vit,
)
from uhd_ops.flops.models import compressor_config, of_vit, patch_size, vit_config
from uhd_ops.flops.paper import PAPER_ROWS, PaperRow, PaperTotal, paper_totals
from uhd_ops.flops.paper_v3 import PUBLISHED_TOKENS, V3Row, v3_rows
from uhd_ops.flops.trace import count_forward, register_formulas
from uhd_ops.nn.early_compressor import CompressorConfig

__all__ = [
    "PAPER_ROWS",
    "PUBLISHED_TOKENS",
    "SIGLIP_SO400M",
    "CompressorConfig",
    "ConnectorConfig",
    "FlopReport",
    "LayerCount",
    "PaperRow",
    "PaperTotal",
    "V3Row",
    "ViTConfig",
    "compressor_config",
    "paper_totals",
    "count_forward",
    "count_vit",
    "of_vit",
    "patch_size",
    "register_formulas",
    "v3_rows",
    "vit_config",
]
