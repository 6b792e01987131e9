# SPDX-License-Identifier: Apache-2.0
"""Helpers of the test_battery_*.py files, which run every operator in SPECS through every check."""

from battery.calls import gradients, make_call, output_rows, run
from battery.compare import assert_close, assert_gradients_close, assert_same, assert_same_bits
from battery.operators import (
    GRIDDED,
    GRIDS,
    ISAS,
    NATIVE,
    OPS,
    TWELVE,
    device_of,
    expected,
    isas,
    not_exempt,
    option_cases,
    parametrize,
    per_case,
    per_op,
    per_variant,
    public,
    using_isa,
)

__all__ = [
    "GRIDDED",
    "GRIDS",
    "ISAS",
    "NATIVE",
    "OPS",
    "TWELVE",
    "assert_close",
    "assert_gradients_close",
    "assert_same",
    "assert_same_bits",
    "device_of",
    "expected",
    "gradients",
    "isas",
    "make_call",
    "not_exempt",
    "option_cases",
    "output_rows",
    "parametrize",
    "per_case",
    "per_op",
    "per_variant",
    "public",
    "run",
    "using_isa",
]
