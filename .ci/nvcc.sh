#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Install CUDA's compiler in a folder, where a machine has none, and print the setting that makes the build use it.
# Usage: .ci/nvcc.sh FOLDER
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
version=13.0
python3 -m pip install --quiet --disable-pip-version-check --target "$folder" \
    nvidia-cuda-{nvcc,crt,runtime,cccl,culibos}=="$version.*" nvidia-nvvm=="$version.*" >&2
toolkit=$folder/nvidia/cu13
# Where nvcc looks for CUDA's runtime, and what CMake looks for.
ln -sfn lib "$toolkit/lib64"
ln -sfn libcudart.so.13 "$toolkit/lib/libcudart.so"
echo "CUDACXX=$toolkit/bin/nvcc"
