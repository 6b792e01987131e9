#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Encode a photograph of 3264x2448 px with and without the early compressor. Needs no network: the
# model's weights are random, which changes neither the time nor the number of tokens.
# Usage: examples/demo.sh PYTHON [OUTPUT-FOLDER]
set -euo pipefail
examples=$(dirname "${BASH_SOURCE[0]}")
python=${1:?usage: examples/demo.sh PYTHON [OUTPUT-FOLDER]}
out=${2:-demo-output}

# Layer 2 of this model's 12 blocks is about as deep as layer 6 of the 27 in the paper.
"$python" -m uhd_ops encode "$examples/images/picos_de_europa.jpg" --layer 2 --compare --out "$out"
echo
echo "Look at $out/picos_de_europa/slices.png. The weights were random: add --pretrained to"
echo "'uhd-ops encode' where there is a network."
