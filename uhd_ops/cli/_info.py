# SPDX-License-Identifier: Apache-2.0
"""``uhd-ops info``: what is installed and what would run, as plain text for bug reports."""

from __future__ import annotations

import argparse
import json

import uhd_ops


def run(arguments: argparse.Namespace) -> None:
    """Print :func:`uhd_ops.build_info`."""
    info = uhd_ops.build_info()
    print(json.dumps(info.to_dict(), indent=2) if arguments.json else info)
