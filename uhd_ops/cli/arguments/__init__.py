# SPDX-License-Identifier: Apache-2.0
"""The command line up to the moment when a command runs: nothing here imports torch.

It is installed a second time, as the package ``uhd_ops_cli``, which the script ``uhd-ops`` imports:
whatever is inside uhd_ops imports torch first, which takes two seconds that ``--help`` and a wrong
argument need not wait for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from .commands import COMMANDS

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None means those of this process.

    Returns:
        Exit code: 0; 2 for a wrong argument, an unreadable image, a missing package or weights that
        cannot be fetched; 3 for images of a corpus that failed, with ``--strict``; 1 when the
        reader of the output has gone; 130 when interrupted. Argparse exits by itself, with 2, for
        arguments it does not know.
    """
    arguments = _parser().parse_args(argv)
    try:
        from uhd_ops.cli._main import run

        return run(arguments)
    except KeyboardInterrupt:
        print(f"uhd-ops {arguments.command}: interrupted", file=sys.stderr)
        return 130


class _ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import uhd_ops

        print(f"uhd_ops {uhd_ops.__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uhd-ops",
        description="Encode high-resolution images, compressing tokens inside the transformer.",
    )
    parser.add_argument(
        "--version", action=_ShowVersion, nargs=0, help="show program's version number and exit"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, add_arguments) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=summary, description=f"{summary}."))
    return parser
