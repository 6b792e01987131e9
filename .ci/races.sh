#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Run the CPU kernels of every instruction set, and the slice planner, on eight threads under ThreadSanitizer: the cases
# of csrc/driver, whose results must also have the same bits on one thread. First with a race in one function after the
# other, whose threads then do all of the work each: those must be reported. Usage: .ci/races.sh PYTHON
set -euo pipefail
python=$1
build=build/races
UHD_TARGET=uhd_race_driver bash .ci/package.sh "$python" "$build" -DUHD_RACES=ON

driver=("$build/uhd_race_driver")
# Where addresses are random in more bits than the sanitizer's runtime knows, it refuses to start.
setarch "$(uname -m)" -R true 2> /dev/null && driver=(setarch "$(uname -m)" -R "${driver[@]}")
isas=$(PYTHONPATH=python_tests${PYTHONPATH:+:$PYTHONPATH} "$python" -c "from battery import ISAS; print(*ISAS)")

planted() { # FUNCTION CASES
    local code=0
    UHD_PLANTED_RACE=$1 TSAN_OPTIONS="halt_on_error=1 exitcode=66 symbolize=0" "${driver[@]}" "$2" \
        > "$build/planted-$UHD_OPS_CPU_ISA.log" 2>&1 || code=$?
    [[ $code == 66 ]] && grep -q "WARNING: ThreadSanitizer: data race" "$build/planted-$UHD_OPS_CPU_ISA.log" && return
    echo "$UHD_OPS_CPU_ISA: a race planted in $1 was not reported (exit code $code)"
    return 1
}

check() { # INSTRUCTION SET
    export UHD_OPS_CPU_ISA=$1
    local count=0 kernel pass said
    for kernel in window_mean window_pool pixel_unshuffle unshuffle_norm linear_activation tile_weight window_attention; do
        for pass in forward backward sum_partials; do
            [[ $pass == sum_partials && $kernel != unshuffle_norm && $kernel != linear_activation ]] && continue
            planted "${kernel}_$pass" "$kernel" || return 1
            count=$((count + 1))
        done
    done
    planted plan_slices planner || return 1
    said=$(TSAN_OPTIONS=halt_on_error=1 "${driver[@]}" 2>&1) || { echo "$1: $said"; return 1; }
    echo "$1: $((count + 1)) planted races were reported; without them $said"
}

pids=()
for isa in $isas; do
    check "$isa" &
    pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do
    wait "$pid" || failed=1
done
exit $failed
