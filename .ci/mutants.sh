#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Plant faults (python_tests/mutants) in the CUDA kernels, and show that the checks of .ci/emulate.sh, whose build this
# uses, notice each of them; and in everything else, with the build of `make build` and the tests of `make test`.
# Usage: .ci/mutants.sh PYTHON [PART OF A DESCRIPTION]
set -euo pipefail
python=$1
build=build/emulate
bash .ci/package.sh "$python" "$build" -DUHD_EMULATE=ON -DUHD_DRIVER=ON -DUHD_SANITIZE=OFF
cmake --build build/cmake --target uhd_cpu uhd_host
"$python" python_tests/mutants/run.py "$build" build/cmake "${@:2}"
