#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Compile the CPU and the host library for aarch64, and run the CPU kernels under qemu-user: csrc/races, each result
# against the kernels' own in float64. Where the cross compiler or qemu is not installed, Debian's packages are
# fetched and unpacked in build/aarch64/root, once. Usage: .ci/aarch64.sh PYTHON
set -euo pipefail
python=$1
build=build/aarch64
root=$PWD/$build/root

fetch() {
    local packages=(g++-aarch64-linux-gnu qemu-user)
    apt-get install --simulate "${packages[@]}" > /dev/null 2>&1 || apt-get update > /dev/null 2>&1
    rm -rf "$root" && mkdir -p "$root/packages"
    (
        cd "$root/packages"
        # shellcheck disable=SC2046
        apt-get download $(apt-get install --simulate "${packages[@]}" | awk '/^Inst/ { print $2 }')
        for package in *.deb; do dpkg -x "$package" "$root"; done
    ) > "$build/fetch.log" 2>&1
    # A script of the linker, which names the other libraries by the folder that they would be installed in.
    sed -i 's#/usr/aarch64-linux-gnu/lib/##g' "$root/usr/aarch64-linux-gnu/lib/libc.so"
    rm -rf "$root/packages"
    touch "$root/complete"
}

if command -v aarch64-linux-gnu-g++ > /dev/null && command -v qemu-aarch64 > /dev/null; then
    root=
elif [[ ! -e $root/complete ]]; then
    mkdir -p "$build"
    echo "Fetching a cross compiler and qemu-user in $build/root, once."
    # In a shell of its own: after "if" and "||", bash goes on where a command fails.
    if ! command -v apt-get > /dev/null || ! bash -c "$(declare -f fetch); build='$build' root='$root'; set -euo pipefail; fetch"; then
        cat "$build/fetch.log" >&2 || true
        echo "NOT RUN: nothing was compiled for aarch64, and no kernel ran on it, because there is no cross compiler" \
            "(aarch64-linux-gnu-g++) and no qemu-aarch64 here, and apt-get could not fetch them. With UHD_OPS_REQUIRE_AARCH64=1 this is an error." >&2
        [[ ${UHD_OPS_REQUIRE_AARCH64:-0} == 0 ]]
        exit
    fi
fi
if [[ -n $root ]]; then
    export PATH=$root/usr/bin:$PATH
    export LD_LIBRARY_PATH=$(dirname "$(find "$root/usr/lib" -name 'libopcodes-*-arm64.so' | head -1)")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
include=$("$python" -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])")/include
cmake -S . -B "$build" -G Ninja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER="$(command -v aarch64-linux-gnu-g++)" -DUHD_DRIVER=ON -DUHD_WERROR="${UHD_OPS_WERROR:-OFF}" \
    -DUHD_TORCH_INCLUDE="$include" > "$build/configure.log"
cmake --build "$build"
aarch64-linux-gnu-readelf --file-header "$build/uhd_race_driver" | grep Machine
qemu-aarch64 -L "$root/usr/aarch64-linux-gnu" "$build/uhd_race_driver"
