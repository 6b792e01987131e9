# SPDX-License-Identifier: Apache-2.0
"""Pictures of slices, windows, merges and costs, drawn with matplotlib.

Every function returns what it has drawn, a matplotlib ``Figure`` or ``Axes``, to be changed, shown
or saved. Without ``figure`` or ``axes`` it makes a new figure of pyplot, so that notebooks show it;
with a ``Figure`` of one's own nothing global is touched. matplotlib is imported by the first call;
``pip install 'uhd_ops[plot]'`` brings it. The command line draws with these functions too.

Example:
    >>> image = torch.zeros(3, 600, 800)
    >>> axes = uhd_ops.plot.views(image, uhd_ops.plan_slices(800, 600), window=2)
    >>> axes.get_title().splitlines()[0]
    '800x600 px: 4 slices of 504x392 px'
"""

from uhd_ops.plot.charts import agreement, bars, costs, layers, timings
from uhd_ops.plot.figures import BLUE, GREY, ORANGE, readable
from uhd_ops.plot.images import merge, ratios, tokens, views
from uhd_ops.plot.pipeline import diagram
from uhd_ops.plot.weights import attention

__all__ = [
    "BLUE",
    "GREY",
    "ORANGE",
    "agreement",
    "attention",
    "bars",
    "costs",
    "diagram",
    "layers",
    "merge",
    "ratios",
    "readable",
    "timings",
    "tokens",
    "views",
]
