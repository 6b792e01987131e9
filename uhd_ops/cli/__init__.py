# SPDX-License-Identifier: Apache-2.0
"""The command line: ``uhd-ops encode``, ``uhd-ops info`` and ``uhd-ops bench``."""

from uhd_ops.cli._main import main

__all__ = ["main"]
