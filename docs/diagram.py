# SPDX-License-Identifier: Apache-2.0
"""Draw docs/images/diagram.png: slice, pack, compress, with tokens and multiply-accumulates.

Usage: python docs/diagram.py [--check]

The picture holds its labels and the heights of its bars as text, too. Pixels depend on the version
of matplotlib, so ``--check`` compares these with what would be drawn now.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import uhd_ops

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "diagram.png"


def draw() -> Figure:
    """Draw the way of the example photograph through the encoder of LLaVA-UHD v4."""
    image = uhd_ops.load_image(ROOT / "examples" / "images" / "picos_de_europa.jpg")
    return uhd_ops.plot.diagram(image, uhd_ops.plan_slices(*image.size), figure=Figure())


def said(figure: Figure) -> str:
    """Return the texts that were written and the heights of all bars, as JSON."""
    found = []
    for axes in figure.axes:
        texts = [axes.get_title("left"), axes.get_xlabel(), axes.get_ylabel()]
        texts += [text.get_text() for text in axes.texts]
        found.append({"texts": texts, "bars": [int(bar.get_height()) for bar in axes.patches]})
    return json.dumps(found)


def main() -> int:
    """Write the picture, or compare it; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where it is out of date")
    check = parser.parse_args().check
    figure, file, info = draw(), io.BytesIO(), PngInfo()
    now = said(figure)
    if check:
        with Image.open(PICTURE) as picture:
            if picture.info["said"] == now:
                return 0
        print("docs/images/diagram.png is out of date: run python docs/diagram.py")
        return 1
    figure.savefig(file, format="png", dpi=130)
    info.add_text("said", now)
    # 256 colours: a third of the bytes, which every clone pays for.
    Image.open(file).convert("RGB").quantize(256).save(PICTURE, pnginfo=info, optimize=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
