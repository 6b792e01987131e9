#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the site in build/docs. A warning is an error: a name in a docstring that is none, a link to a page or heading
# that is not there, code that no lexer takes, a picture whose script fails. With UHD_OPS_DOCS_ONLINE=1, on a machine
# with a network, names of torch, numpy and Python become links, and links to other sites are followed.
# Usage: .ci/docs.sh PYTHON
set -euo pipefail
python=$1
# From nothing: Sphinx warns of a page, and the gallery runs a script, only where that one has changed.
rm -rf build/docs build/doctrees docs/generated
build() { "$python" -m sphinx --fail-on-warning --keep-going --quiet -d build/doctrees -b "$@"; }
build html docs build/docs
[[ ${UHD_OPS_DOCS_ONLINE:-0} != 1 ]] || build linkcheck docs build/linkcheck
echo "The site is in build/docs: open build/docs/index.html"
