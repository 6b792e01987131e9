# SPDX-License-Identifier: Apache-2.0
"""Settings of the site, which ``make docs`` builds in build/docs."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the extension "site_pages"

import uhd_ops  # noqa: E402

project = "uhd_ops"
author = copyright = "uhd_ops developers"
version = release = uhd_ops.__version__
html_title = f"uhd_ops {version}"

extensions = [
    "myst_parser",
    "site_pages",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["gallery"]  # scripts; what is made of them is in generated/

# The inventories of other projects are fetched at every build. A build without a network would warn
# of each that it cannot fetch, and a warning is an error here: so they are asked for only where
# somebody says that there is a network. Elsewhere, names of other projects have no link.
ONLINE = os.environ.get("UHD_OPS_DOCS_ONLINE", "0") == "1"
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "numpy": ("https://numpy.org/doc/stable", None),
    "PIL": ("https://pillow.readthedocs.io/en/stable", None),
    "torch": ("https://docs.pytorch.org/docs/stable", None),
}
nitpicky = True  # a name that is documented nowhere is a warning, too
nitpick_ignore_regex = [
    # As they stand in annotations that are never evaluated, or where other projects define them.
    ("py:class", r"(nn\.Module|Image\.Image|Kimi_K25VisionModel|Mapping\[str|Limits)"),
    ("py:class", r"(Axes|Figure|SubFigure)"),
    ("py:class", r"(torch\.nn\.modules|numpy\._typing)\..*"),
    # Types that nobody has to make: of internals, and the variable for "the same class of models".
    ("py:class", r"(uhd_ops\..*\.)?(Model|Rotary|Scope|ViewScope|BuildInfo)"),
]
if not ONLINE:
    intersphinx_mapping = {}
    nitpick_ignore_regex += [("py:.*", r"(collections|numpy|os|torch)\..*")]

html_theme = "furo"
html_copy_source = False
html_show_sphinx = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Shape", "Source"]
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "generated/gallery",
    "backreferences_dir": None,
    "filename_pattern": r"/plot_",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "min_reported_time": 1e9,  # seconds: the times of whoever builds the site tell a reader nothing
    "write_computation_times": False,
}
