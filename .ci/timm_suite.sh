#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Run timm's own tests, of the version that is installed, on models with a compressor. docs/timm_tests.md says more.
# Usage: .ci/timm_suite.sh PYTHON [PYTEST ARGUMENTS]
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
root=$PWD
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

version=$("$python" -c "import timm; print(timm.__version__)")
echo "Fetching the source archive of timm $version, for its tests."
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary timm --dest "$folder" "timm==$version"
tar -xzf "$folder/timm-$version.tar.gz" -C "$folder" --strip-components 1 "timm-$version/tests"
cd "$folder"
export PYTHONPATH=$root:$root/python_tests OMP_NUM_THREADS=1
"$python" -m pytest -q -p timm_suite -p no:cacheprovider -c /dev/null --rootdir . --disable-warnings "$@" \
    tests/test_{models,model_input,checkpoint_loading,layers_pos_embed,task,utils}.py
