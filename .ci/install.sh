#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Install the pinned packages of the development environment, and show how far it is. Usage: .ci/install.sh VENV
set -euo pipefail
venv=$1
[[ -x $venv/bin/python ]] || python3 -m venv "$venv"
echo "Installing the $(grep -c == requirements-dev.txt) packages of requirements-dev.txt, and what they need, in $venv."
echo "This is done once; it takes some minutes, and 5 GB of the disk."
(
    # Of what pip says, the archive that it fetches, with its size. Errors go to stderr, past this.
    "$venv/bin/python" -u -m pip install --disable-pip-version-check --progress-bar off -r requirements-dev.txt \
        | sed -unE -e '/\.metadata/d' -e 's#^ *(Downloading|Using cached|Processing) ([^ ]*/)?#    #p' \
            -e 's/^Installing collected packages.*/Unpacking all of them./p'
) &
for ((seconds = 1; ; seconds++)); do
    sleep 1
    kill -0 $! 2> /dev/null || break
    ((seconds % 15)) || echo "    $seconds s: $(du -sh "$venv" 2> /dev/null | cut -f 1) in $venv"
done
wait $!
touch "$venv/.installed"
