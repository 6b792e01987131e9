#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Rehearse benchmarks/gpu_all.py with the versions of the GPU machines, as far as it goes without a GPU: configure its
# build, collect its tests, and run its cases, tiny, on the CPU. Usage: .ci/gpu_call.sh PYTHON
set -euo pipefail
python=$1
site=$PWD/.venv-gpu
versions="torch==2.11.0 torchvision==0.26.0 triton==3.6.0 transformers==5.17.0"

# Only what differs, before the development environment on the path: CUDA's libraries are those of its torch, which has
# the same major version of CUDA. What transformers needs comes along, because it refuses other versions of it.
if [[ $(cat "$site/versions.txt" 2> /dev/null) != "$versions" ]]; then
    echo "Installing the versions of the GPU machines in $site, once: $versions"
    rm -rf "$site"
    install() {
        "$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$site" "$@" 2> "$site.log" \
            || { cat "$site.log"; exit 1; }
    }
    install ${versions##* }
    install --upgrade --no-deps ${versions% *}
    echo "$versions" > "$site/versions.txt"
fi
export PYTHONPATH=$site
"$python" - $versions <<'PROGRAM'
import importlib, sys
import torch
for word in sys.argv[1:]:
    name, _, version = word.partition("==")
    found = importlib.import_module(name).__version__
    assert found.split("+")[0] == version, (name, found)
assert torch.version.cuda.startswith("13."), torch.version.cuda
PROGRAM
out=build/gpu_call
mkdir -p "$out"
"$python" benchmarks/gpu_all.py --rehearse --budget 900 --out "$out" || { tail -n 30 "$out"/*.log; exit 1; }
TRITON_INTERPRET=1 "$python" -m pytest -q -p no:cacheprovider python_tests/test_gpu_benchmark.py -k "triton or segments"
