#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Test the plugin for vLLM and the patch for SGLang against the sources of their models. The rest of both, which pin other
# versions of torch and want a GPU, is not needed.
# Usage: .ci/serving_suite.sh PYTHON [PYTEST ARGUMENTS]
set -euo pipefail
python=$1
shift
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

fetch() {  # NAME==VERSION
    echo "Fetching $1, for the sources of its models."
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$folder" "$1"
    "$python" -m zipfile -e "$folder/${1%%==*}"-*.whl "$folder/sources"
    rm "$folder/${1%%==*}"-*.whl
}
fetch vllm==0.33.0
fetch sglang==0.5.23
SERVING_SOURCES=$folder/sources OMP_NUM_THREADS=1 "$python" -m pytest -q python_tests/serving_suite.py "$@"
