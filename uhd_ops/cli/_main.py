# SPDX-License-Identifier: Apache-2.0
"""Parse the command line, run one command, turn errors of the user into one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import uhd_ops
from uhd_ops.cli import _bench, _encode, _encode_dataset, _flops, _info, _profile
from uhd_ops.cli._support import UserError


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
        code = arguments.run(arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"uhd-ops {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has gone
        # Python flushes stdout once more at exit; give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"uhd-ops {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uhd-ops",
        description="Encode high-resolution images, compressing tokens inside the transformer.",
    )
    parser.add_argument("--version", action="version", version=f"uhd_ops {uhd_ops.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {"encode": _encode, "encode-dataset": _encode_dataset}
    modules |= {"flops": _flops, "profile": _profile, "info": _info, "bench": _bench}
    for name, module in modules.items():
        summary = module.SUMMARY
        command = commands.add_parser(name, help=summary, description=f"{summary}.")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
