#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Plant faults in the CUDA kernels (python_tests/mutants) and show that the checks of .ci/emulate.sh, whose build this
# uses, notice each of them. Usage: .ci/mutants.sh PYTHON [PART OF A DESCRIPTION]
set -euo pipefail
python=$1
build=build/emulate
bash .ci/package.sh "$python" "$build" -DUHD_EMULATE=ON -DUHD_DRIVER=ON -DUHD_SANITIZE=OFF
"$python" python_tests/mutants/run.py "$build" "${@:2}"
