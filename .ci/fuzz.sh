#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Make thousands of hostile calls in child processes: each must raise an exception or be right. Usage:
# .ci/fuzz.sh PYTHON [--sanitize] [ARGUMENTS OF python_tests/fuzz]
# With --sanitize, fewer of them on the CPU kernels that .ci/sanitize.sh has built.
set -euo pipefail
python=$1
shift
export PYTHONPATH=$PWD:$PWD/python_tests OMP_NUM_THREADS=1
if [[ ${1:-} == --sanitize ]]; then
    shift
    set -- --public 1000 --direct 2000 --seed 1000000 "$@"
    # As in sanitize.sh. What no machine can allocate is an exception here too.
    export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so.6)" UHD_OPS_SANITIZED=1
    export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096:handle_segv=0 UBSAN_OPTIONS=halt_on_error=1
    export PYTHONPATH=$PWD/build/sanitize/package:$PWD/python_tests
fi
"$python" -P -m fuzz "$@"
