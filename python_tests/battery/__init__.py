# SPDX-License-Identifier: Apache-2.0
"""Helpers of the test_battery_*.py files, which run every operator in SPECS through every check."""

from battery.calls import gradients, make_call, output_rows, run
from battery.compare import assert_close, assert_same, assert_same_bits
from battery.operators import (
    GRIDDED,
    GRIDS,
    ISAS,
    NATIVE,
    OPS,
    expected,
    not_exempt,
    option_cases,
    per_case,
    public,
    using_isa,
)

__all__ = [
    "GRIDDED",
    "GRIDS",
    "ISAS",
    "NATIVE",
    "OPS",
    "assert_close",
    "assert_same",
    "assert_same_bits",
    "expected",
    "gradients",
    "make_call",
    "not_exempt",
    "option_cases",
    "output_rows",
    "per_case",
    "public",
    "run",
    "using_isa",
]
