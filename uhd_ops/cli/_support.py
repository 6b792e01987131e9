# SPDX-License-Identifier: Apache-2.0
"""What the commands share: errors meant for the user, optional packages, argument types."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class UserError(Exception):
    """Something that the user can put right; shown as one line, without a traceback."""


def require(*packages: str, extra: str = "cli") -> None:
    """Raise a UserError that names the extra if a package is not installed; imports none."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"missing packages: {', '.join(missing)}; install them with: pip install "
            f"'uhd_ops[{extra}]'"
        )


@contextlib.contextmanager
def user_errors(*errors: type[Exception], prefix: str = "") -> Iterator[None]:
    """Turn ``errors`` into a UserError that starts with ``prefix``."""
    try:
        yield
    except errors as error:
        raise UserError(f"{prefix}{error}") from error


def report(
    arguments: argparse.Namespace,
    result: dict[str, Any],
    show: Callable[[dict[str, Any]], None],
    draw: Callable[[dict[str, Any], Figure], object],
) -> None:
    """Write what ``--plot`` asks for, then print a result as JSON or as tables.

    Args:
        arguments: With ``plot``, a path or None, and ``json``.
        result: What ``--json`` prints.
        show: Prints tables of it.
        draw: Draws it in a figure.

    Raises:
        UserError: The plot cannot be written.
    """
    if arguments.plot:
        # A figure without pyplot needs no display and leaves no global state behind.
        from matplotlib.figure import Figure

        figure = Figure()
        draw(result, figure)
        with user_errors(OSError, ValueError, prefix="cannot write the plot: "):
            figure.savefig(arguments.plot, dpi=110)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    show(result)
    if arguments.plot:
        print(f"wrote {arguments.plot}")


def new_table(*words: str, numbers: tuple[str, ...], title: str) -> Any:
    """Return an empty table of rich: columns of words, then of numbers, aligned to the right."""
    from rich.table import Table

    table = Table(*words, title=title, title_justify="left")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def share(value: float) -> str:
    """Write a share as percent."""
    return f"{value:.1%}"
