# SPDX-License-Identifier: Apache-2.0
"""The command line ``uhd-ops``; each command has a module of its name."""

from uhd_ops.cli.arguments import main

__all__ = ["main"]
