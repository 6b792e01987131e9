# SPDX-License-Identifier: Apache-2.0
"""Check what is in a source archive and in a wheel, and how large they are.

python .ci/wheel_contents.py ARCHIVE WHEEL
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

# What an archive may hold besides uhd_ops and csrc.
FILES = ("CHANGELOG.md", "CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md")
FILES += ("pyproject.toml", "setup.py")
# Those of the build in place, in which there is CUDA where there is nvcc.
LIBRARIES = {str(path) for path in Path("uhd_ops").glob("*.so")}
# In MB; docs/adr/0014-packages.md says what they were when these bounds were set.
BOUNDS = {".tar.gz": 1, ".whl": 10, "libuhd_cpu.so": 5, "libuhd_cuda.so": 12, "libuhd_host.so": 0.2}


def tracked(*folders: str) -> set[str]:
    """Return the files that git knows in folders."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "--", *folders]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.splitlines() if Path(name).exists()}


def check_archive(path: str) -> list[str]:
    """Compare an archive with the checkout, byte by byte: what is built from one is the other."""
    with tarfile.open(path) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        inside = {m.name.partition("/")[2]: archive.extractfile(m).read() for m in members}
    wanted = tracked("csrc", "uhd_ops") | {*FILES}
    made = {"PKG-INFO", "setup.cfg"} | {x for x in inside if x.startswith("uhd_ops.egg-info/")}
    wrong = [f"{name} is not in {path}" for name in wanted - inside.keys()]
    wrong += [f"{name} is in {path}" for name in inside.keys() - wanted - made]
    same = wanted & inside.keys()
    return wrong + [f"{x} differs in {path}" for x in same if inside[x] != Path(x).read_bytes()]


def check_wheel(path: str) -> list[str]:
    """Check the files of a wheel, and that it fits every Python, and more than one Linux."""
    with zipfile.ZipFile(path) as wheel:
        sizes = {x.filename: x.file_size for x in wheel.infolist() if not x.is_dir()}
    python, abi, platform = Path(path).stem.split("-")[2:]
    wrong = []
    if (python, abi) != ("py3", "none") or not platform.startswith("manylinux_2_"):
        wrong.append(f"{path} is not for every Python on manylinux")
    package = {x for x in sizes if ".dist-info/" not in x}
    wanted = {x for x in tracked("uhd_ops") if x.endswith((".py", "py.typed"))} | LIBRARIES
    wanted |= {x.replace("uhd_ops/cli/arguments", "uhd_ops_cli") for x in wanted}  # as in setup.py
    needed = {"uhd_ops/libuhd_cpu.so", "uhd_ops/libuhd_host.so"}
    wrong += [f"{name} was not built" for name in needed - package]
    wrong += [f"{name} is not in {path}" for name in wanted - package]
    wrong += [f"{name} is in {path}" for name in package - wanted]
    for name in sorted(LIBRARIES & package):
        wrong += check_size(name, sizes[name])
    return wrong


def check_size(name: str, size: int) -> list[str]:
    """Print a size, and compare it with its bound."""
    bound = next(bound for end, bound in BOUNDS.items() if name.endswith(end))
    print(f"    {name}: {size / 1e6:.2f} MB of at most {bound:g}")
    return [f"{name} has {size} bytes, more than {bound:g} MB"] * (size > bound * 1e6)


def main() -> int:
    """Check both; return the exit status."""
    archive, wheel = sys.argv[1:]
    wrong = check_archive(archive) + check_wheel(wheel)
    for path in (archive, wheel):
        wrong += check_size(path, Path(path).stat().st_size)
    for line in sorted(wrong):
        print(line, file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
