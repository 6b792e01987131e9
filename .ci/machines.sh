#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Run the tests that compare bits as on other machines: torch's products add in another order there, and ours run on
# other instruction sets and more threads. What `make test` has run is the machine as it is, with one thread.
# Usage: .ci/machines.sh PYTHON [PYTEST ARGUMENTS]
set -euo pipefail
python=$1
shift

machine() { # NAME=VALUE... -- PYTEST ARGUMENTS
    local settings=()
    while [[ $1 != -- ]]; do
        settings+=("$1")
        shift
    done
    echo "As on another machine: ${settings[*]}"
    # More threads than cores wait for each other: asleep, or they take the time that the others need.
    env OMP_WAIT_POLICY=passive "${settings[@]}" "$python" -m pytest -q -p no:cacheprovider -n "${UHD_TEST_PROCESSES:-2}" --timeout 600 "${@:2}"
}

isas=$(PYTHONPATH=python_tests${PYTHONPATH:+:$PYTHONPATH} "$python" -c "from battery import ISAS; print(*ISAS)")
echo "Instruction sets of this processor: $isas"
isa() { # The one asked for, or the best that there is below it.
    [[ " $isas " == *" $1 "* ]] && echo "$1" || echo "${isas##* }"
}

# Products that add in another order for each memory layout, number of rows and number of threads.
compiler="compile or inductor or export or opcheck" # half of the time; the processor with AVX2 below has them all
machine UHD_OPS_TEST_PLANTED_PRODUCT=1 UHD_OPS_TEST_THREADS=2 UHD_OPS_CPU_ISA="$(isa avx512)" -- -m bits -k "not ($compiler)" "$@"
# The libraries' own ways of computing as on another processor: with no vectors at all, which is far from any that runs
# torch, for operators and modules; with those of AVX2 for everything, but for a sample of what is compiled.
# torch's attention in bfloat16 asks the processor what it can do, and not this setting, and then fails.
machine MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default UHD_OPS_CPU_ISA=scalar -- \
    python_tests/test_{battery,window,pixel,padded}_*.py python_tests/test_{nn_modules,linear_activation,unshuffle_norm,slice_encoder}.py \
    -m bits -k "not ($compiler or test_dtypes and bfloat16)" "$@"
machine MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 UHD_OPS_CPU_ISA="$(isa avx2)" -- -m bits \
    -k "not (families_lifecycle and ($compiler)) and not recompile or VisionTransformer or SigLIP" "$@"
# Every operator on its definition, as where there is no compiler.
machine UHD_OPS_DISABLE_NATIVE=1 UHD_OPS_TEST_PLANTED_PRODUCT=1 -- python_tests/test_battery_*.py \
    -k "equals or form or grids or gradcheck or bad or a_view_alone or written" "$@"
