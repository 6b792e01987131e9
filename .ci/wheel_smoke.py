# SPDX-License-Identifier: Apache-2.0
"""Use the installed package as somebody who has just read README: its first block of Python.

Run by a Python that has the package: python .ci/wheel_smoke.py
"""

import importlib.metadata
import os
import re
import sys
import warnings
from pathlib import Path

import torch

with warnings.catch_warnings():
    warnings.simplefilter("error", RuntimeWarning)  # kernels that are missing
    import uhd_ops

assert sys.prefix in uhd_ops.__file__, f"{uhd_ops.__file__} is not in {sys.prefix}"
assert importlib.metadata.version("uhd_ops") == uhd_ops.__version__
status = uhd_ops._native.status
assert (status["cpu"], status["host"]) == ("loaded", "loaded"), status
# A torch without CUDA does not touch the CUDA library, and not every wheel has one.
there = Path(uhd_ops.__file__).with_name("libuhd_cuda.so").exists()
wanted = ("loaded" if there else "absent") if torch.version.cuda else "torch has no CUDA"
assert status["cuda"] == wanted, status
os.chdir(Path(__file__).resolve().parent.parent)  # the example opens an image of it
block = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[1]
print(f"README's first example, on torch {torch.__version__} in {sys.prefix}:")
exec(compile(block, "README.md", "exec"))
