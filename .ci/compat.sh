#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The wheel that is built against the development torch must work on the oldest torch that the package admits.
# Usage: .ci/compat.sh PYTHON
set -euo pipefail
python=$1
oldest=2.10.0
venv=.venv-compat

rm -rf build/dist
mkdir -p build
echo "Making the source archive, and the wheel from it, for torch $oldest (log: build/dist.log)."
# Source archive first, then the wheel from that archive: a file missing from the archive fails here.
# Whether the CUDA library loads does not depend on its architectures: PTX alone is quick to make.
UHD_OPS_BUILD_DIR=$PWD/build/wheel UHD_OPS_CUDA_ARCHS=90-virtual "$python" -m build --no-isolation --outdir build/dist . > build/dist.log 2>&1 \
    || { tail -50 build/dist.log; exit 1; }
if ! "$venv/bin/python" -c "import torch; assert torch.__version__.startswith('$oldest')" 2> /dev/null; then
    echo "Installing torch $oldest in $venv, once."
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$oldest" \
        $(grep -E '^(numpy|pillow|pytest|pytest-timeout|pytest-xdist|hypothesis)==' requirements-dev.txt)
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall build/dist/*.whl
tests=$PWD/python_tests
cd build/dist # so that the installed package is imported, not the checkout
"../../$venv/bin/python" -P - <<'PROGRAM'
import torch, uhd_ops
assert "site-packages" in uhd_ops.__file__, uhd_ops.__file__
assert uhd_ops._native.status["cpu"] == "loaded", uhd_ops._native.status
assert uhd_ops._native.status["cuda"] in ("loaded", "absent"), uhd_ops._native.status
print(f"wheel built on the development torch, loaded on torch {torch.__version__}")
PROGRAM
"../../$venv/bin/python" -P -m pytest -q -p no:cacheprovider -c ../../pyproject.toml -n 2 --timeout 600 \
    "$tests/test_battery_values.py" "$tests/test_battery_gradients.py" "$tests/test_grids.py"
