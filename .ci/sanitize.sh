#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer and run the operators' value and
# gradient tests on them. Usage: .ci/sanitize.sh PYTHON
set -euo pipefail
python=$1
build=build/sanitize
package=$build/package/uhd_ops

rm -rf "$package"
mkdir -p "$build/package"
include=$("$python" -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])")/include
cmake -S . -B "$build" -G Ninja -DUHD_SANITIZE=ON -DUHD_CUDA=OFF -DUHD_TORCH_INCLUDE="$include" \
    -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" > "$build/configure.log"
cmake --build "$build"
(cd uhd_ops && find . -name '*.py' -o -name py.typed) | while read -r file; do
    install -D -m 644 "uhd_ops/$file" "$package/$file"
done
cmake --install "$build" --prefix "$package" > "$build/install.log"

# The sanitizer's runtime must come first in the process, and libstdc++ with it, or it does not find the function that
# throws exceptions. Python itself leaks on exit by design.
runtime="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so.6)"
LD_PRELOAD=$runtime ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1 \
    PYTHONPATH=$build/package UHD_OPS_SANITIZED=1 \
    "$python" -P -m pytest -q -p no:cacheprovider -n 2 --timeout 900 \
    python_tests/test_battery_values.py python_tests/test_battery_gradients.py "${@:2}"
