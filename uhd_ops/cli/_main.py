# SPDX-License-Identifier: Apache-2.0
"""Run one command, and turn errors of the user into one line."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from uhd_ops.cli._support import UserError


def run(arguments: argparse.Namespace) -> int:
    """Run the command that was asked for, and return the exit code of the process."""
    try:
        command = importlib.import_module(f"uhd_ops.cli._{arguments.command.replace('-', '_')}")
        code = command.run(arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"uhd-ops {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has gone
        # Python flushes stdout once more at exit; give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code or 0
