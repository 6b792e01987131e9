#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the native libraries in place, and show each step of it. Usage: .ci/build.sh PYTHON
set -euo pipefail
log=build/install.log
mkdir -p build
echo "Building the native libraries; everything that pip says is in $log."
# Ninja's steps, what compilers complain about, and the boxes of setup.py.
"$1" -u -m pip install -v --disable-pip-version-check --no-deps --no-build-isolation -e . 2>&1 | tee "$log" \
    | sed -unE -e 's/^ *(\[[0-9]+\/[0-9]+\])/    \1/p;t' -e '/(warning|error):/p' -e '/^ *\*/p' \
    || { tail -n 60 "$log"; exit 1; }
