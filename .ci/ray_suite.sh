#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Encode a corpus on a Ray of this machine, kill one of its workers, and compare with the local engine.
# Usage: .ci/ray_suite.sh PYTHON [PYTEST ARGUMENTS]
set -euo pipefail
python=$1
shift
folder=$PWD/build/ray
if ! cmp -s .ci/ray.txt "$folder/ray.txt"; then
    echo "Installing Ray in build/ray, once."
    rm -rf "$folder"
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target "$folder" -r .ci/ray.txt
    cp .ci/ray.txt "$folder"
fi
# What Ray is warned about by itself is not ours. Its workers start as new processes, which find both packages by this path.
PYTHONPATH=$PWD:$folder${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 "$python" -m pytest -q python_tests/ray_suite.py \
    -W ignore::DeprecationWarning -W ignore::FutureWarning "$@"
