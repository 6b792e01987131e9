#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the package for tests beside the one in the checkout, in BUILD/package, without a CUDA library. With UHD_TARGET in
# the environment, that target of the build alone, and no package.
# Usage: .ci/package.sh PYTHON BUILD [CMAKE OPTIONS]
set -euo pipefail
python=$1
build=$2
package=$build/package/uhd_ops

rm -rf "$package"
mkdir -p "$build"
include=$("$python" -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])")/include
cmake -S . -B "$build" -G Ninja -DUHD_CUDA=OFF -DUHD_WERROR="${UHD_OPS_WERROR:-OFF}" "${@:3}" -DUHD_TORCH_INCLUDE="$include" \
    > "$build/configure.log"
cmake --build "$build" ${UHD_TARGET:+--target "$UHD_TARGET"}
[[ -z ${UHD_TARGET:-} ]] || exit 0
(cd uhd_ops && find . -name '*.py' -o -name py.typed) | while read -r file; do
    install -D -m 644 "uhd_ops/$file" "$package/$file"
done
cmake --install "$build" --prefix "$package" > "$build/install.log"
