#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The wheel that was built against the development torch must work with the oldest versions that the package admits,
# all at once: .ci/oldest.txt. .ci/wheel.sh has made it and installed it in .venv-compat. Usage: .ci/compat.sh
set -euo pipefail
venv=.venv-compat

tests=$PWD/python_tests
cd build/dist # so that the installed package is imported, not the checkout
"../../$venv/bin/python" -P - ../../.ci/oldest.txt <<'PROGRAM'
import importlib.metadata, sys
import torch, uhd_ops
assert "site-packages" in uhd_ops.__file__, uhd_ops.__file__
assert uhd_ops._native.status["cpu"] == "loaded", uhd_ops._native.status
assert uhd_ops._native.status["cuda"] in ("loaded", "absent"), uhd_ops._native.status
for line in open(sys.argv[1]):
    name, _, version = line.strip().partition("==")
    assert not version or importlib.metadata.version(name).split("+")[0] == version, name
print(f"wheel built on the development torch, loaded on torch {torch.__version__}")
PROGRAM
run() {
    # What libraries of that age are warned about is not ours.
    "../../$venv/bin/python" -P -m pytest -q -p no:cacheprovider -c ../../pyproject.toml -W ignore::DeprecationWarning \
        -n 2 --timeout 600 "$@"
}
run "$tests/test_battery_values.py" "$tests/test_battery_gradients.py" "$tests/test_grids.py" "$tests/test_slicing.py" \
    "$tests/test_floors.py"
# The families that those versions hold; what has come to them later is not asked of them.
families="(VisionTransformer or Beit or SigLIP or CLIP) and not RelPos and not SAM and not siglip2"
later="biases or masks_are_refused or (set_input_size and Beit) or (gradient_checkpointing and (SigLIP or CLIP))"
UHD_OPS_TEST_FAMILIES="vision_transformer relative_positions" run "$tests/test_families.py" \
    "$tests/test_families_lifecycle.py" "$tests/test_hf_pretrained.py" -k "$families and not ($later)"
run "$tests"/test_cli{,_bench,_flops,_profile}.py -k "not takes_every_family and not other_families"
