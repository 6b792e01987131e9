#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Run tests on the CUDA kernels without a GPU: the CUDA sources compiled by a C++ compiler against csrc/emulator, as a
# libuhd_cpu.so whose operators run them on CPU tensors. Usage: .ci/emulate.sh PYTHON [--sanitize] [PYTEST ARGUMENTS]
# Without pytest arguments, the driver, which tries six orders of threads, and the tests that run kernels on their own, in
# the greedy order: with --sanitize the thorough ones, on values and gradients, and without it the others.
set -euo pipefail
python=$1
shift
sanitize=OFF
driver=ON
if [[ ${1:-} == --sanitize ]]; then
    sanitize=ON
    driver=OFF # minutes to compile, and what it checks runs below
    shift
fi
build=build/emulate
[[ $sanitize == ON ]] && build=build/emulate-sanitize
bash .ci/package.sh "$python" "$build" -DUHD_EMULATE=ON -DUHD_DRIVER=$driver -DUHD_SANITIZE=$sanitize

if [[ $# == 0 ]]; then
    [[ $driver == OFF ]] || "$build/uhd_cuda_driver"
    export UHD_EMULATOR_ORDER=${UHD_EMULATOR_ORDER:-greedy}
    if [[ $sanitize == ON ]]; then
        set -- python_tests/test_battery_{values,gradients}.py \
            python_tests/test_{window_attention_kernels,unshuffle_norm,linear_activation}.py
    else
        set -- python_tests/test_battery_{determinism,memory}.py \
            python_tests/test_{padded_grids,window_attention,window_attention_rotary,window_mean,window_pool,pixel_unshuffle,pixel_unshuffle_mlp}.py \
            python_tests/test_tile_weight.py
    fi
fi
if [[ $sanitize == ON ]]; then
    # The sanitizer's runtime must come first in the process, and libstdc++ with it, or it does not find the function
    # that throws exceptions. Python itself leaks on exit by design.
    export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so.6)"
    export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1 UHD_OPS_SANITIZED=1
fi
export PYTHONPATH=$build/package
"$python" -P -c "from uhd_ops import _native; assert _native.cpu_isa() == 'emulated', _native.status"
"$python" -P -m pytest -q -p no:cacheprovider -n "${UHD_TEST_PROCESSES:-2}" --timeout 900 -m "not cuda" "$@"
