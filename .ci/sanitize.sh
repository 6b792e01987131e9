#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer and run the operators' value and
# gradient tests on them. Usage: .ci/sanitize.sh PYTHON
set -euo pipefail
python=$1
build=build/sanitize
bash .ci/package.sh "$python" "$build" -DUHD_SANITIZE=ON

# The sanitizer's runtime must come first in the process, and libstdc++ with it, or it does not find the function that
# throws exceptions. Python itself leaks on exit by design.
runtime="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so.6)"
LD_PRELOAD=$runtime ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1 \
    PYTHONPATH=$build/package UHD_OPS_SANITIZED=1 \
    "$python" -P -m pytest -q -p no:cacheprovider -n 2 --timeout 900 -m "not cuda" \
    python_tests/test_battery_values.py python_tests/test_battery_gradients.py "${@:2}"
