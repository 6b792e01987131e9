# SPDX-License-Identifier: Apache-2.0
"""Packages: what their metadata say, and installing them with and without a compiler and torch."""

import ast
import email
import email.policy
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import setuptools
import tomllib

import uhd_ops

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USE_IT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import uhd_ops
    import torch
    q = torch.randn(15, 2, 8, requires_grad=True)
    uhd_ops.window_attention(q, q, q, [(3, 5)]).sum().backward()
    plan = uhd_ops.plan_slices(1920, 1080)
ours = [w for w in caught if "uhd_ops" in str(w.message)]
assert [w.category for w in ours] == [RuntimeWarning], [str(w.message) for w in caught]
assert "no native CPU kernels (absent)" in str(ours[0].message), ours[0].message
assert q.grad.isfinite().all() and plan.grid == (2, 4)
assert uhd_ops._native.status["cpu"] == uhd_ops._native.status["host"] == "absent"
print("imported from", uhd_ops.__file__)
"""


def pip(command, *options, env=None):
    words = [sys.executable, "-m", "pip", command, "--no-deps", "--disable-pip-version-check"]
    return subprocess.run([*words, *options], env=env, capture_output=True, text=True)


def build_wheel(tmp_path, **environment):
    """Build a wheel from a copy of the sources; return the finished process and the wheels."""
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    no_binaries = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("csrc", "uhd_ops"):
        shutil.copytree(ROOT / folder, source / folder, ignore=no_binaries)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("UHD_OPS_") and k != "CXX"}
    target = str(tmp_path / "wheels")
    done = pip(
        "wheel",
        "-v",
        "--no-build-isolation",
        "-w",
        target,
        str(source),
        env={**kept, **environment},
    )
    return done, sorted((tmp_path / "wheels").glob("*.whl"))


def use_wheel(wheel, tmp_path):
    """Install the wheel beside nothing and run the reference path from it."""
    target = tmp_path / "installed"
    pip("install", "-q", "--target", str(target), str(wheel)).check_returncode()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("UHD_OPS_")}
    # -S: without the .pth files of the environment, one of which makes the checkout importable.
    path = os.pathsep.join([str(target), sysconfig.get_paths()["purelib"]])
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", USE_IT],
        env={**environment, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/nonexistent/c++"}, "no C++ compiler found (looked for /nonexistent/c++"),
        ({"CXX": "/bin/false"}, "the C++ compiler /bin/false does not compile a program in C++17"),
        ({"UHD_OPS_NO_NATIVE": "1"}, "UHD_OPS_NO_NATIVE is set"),
    ],
    ids=["no compiler", "broken compiler", "switched off"],
)
def test_without_compiler_installs_and_says_so(tmp_path, environment, reason):
    done, wheels = build_wheel(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert f"building WITHOUT native kernels: {reason}" in done.stdout + done.stderr
    version = f"{uhd_ops.__version__}+reference"
    assert [wheel.name for wheel in wheels] == [f"uhd_ops-{version}-py3-none-any.whl"]
    use_wheel(wheels[0], tmp_path)


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "/bin/false"])
def test_required_native_kernels_fail_the_install(tmp_path, compiler):
    done, wheels = build_wheel(tmp_path, CXX=compiler, UHD_OPS_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert not wheels


def test_a_failing_build_fails_the_install(tmp_path):
    cmake = tmp_path / "bin" / "cmake"
    cmake.parent.mkdir()
    cmake.write_text("#!/bin/sh\nexit 3\n")
    cmake.chmod(0o755)
    path = os.pathsep.join([str(cmake.parent), os.environ["PATH"]])
    done, wheels = build_wheel(tmp_path, PATH=path)
    assert done.returncode != 0
    assert not wheels
    assert "the native build FAILED" in done.stdout + done.stderr
    assert "UHD_OPS_NO_NATIVE=1 installs without kernels" in done.stdout + done.stderr


class IsolatedBuild:
    """setup.py as pip's isolated build runs it, in a new environment.

    As in pip, PYTHONPATH leads to a sitecustomize.py that hides the folders of packages and what
    their .pth files name; setuptools is in a folder of its own.
    """

    def __init__(self, root, system_site=False):
        self.environment, self.source = root / "environment", root / "source"
        venv.create(self.environment, with_pip=False, system_site_packages=system_site)
        self.hiding = root / "hiding"
        (self.hiding / "packages").mkdir(parents=True)
        site = Path(setuptools.__file__).parent.parent
        for part in (*site.glob("setuptools*"), site / "_distutils_hack"):
            (self.hiding / "packages" / part.name).symlink_to(part)
        (self.hiding / "sitecustomize.py").write_text(
            "import sys\n"
            f"kept = [p for p in sys.path if p.startswith({sys.base_prefix!r})]\n"
            "sys.path[:] = [p for p in kept if 'site-packages' not in p]\n"
            f"sys.path.append({str(self.hiding / 'packages')!r})\n"
        )
        no_binaries = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "uhd_ops", self.source / "uhd_ops", ignore=no_binaries)
        for name in SOURCES:
            shutil.copy(ROOT / name, self.source / name)

    def add_path_file(self, folder):
        """A .pth file that names the folder."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = self.environment / "lib" / version / "site-packages"
        packages.mkdir(parents=True, exist_ok=True)
        (packages / "elsewhere.pth").write_text(f"{folder}\n")

    def run(self, *command, **environment):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("UHD_OPS_") and k != "CXX"}
        hiding = {"PYTHONPATH": str(self.hiding), "PYTHONNOUSERSITE": "1"}
        words = [str(self.environment / "bin" / "python"), "setup.py", *command]
        return subprocess.run(
            words,
            cwd=self.source,
            env={**kept, **hiding, **environment},
            capture_output=True,
            text=True,
        )


def write_torch(folder, minor):
    """A torch that fails where it is imported, with the header that tells its version."""
    header = folder / "torch" / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    header.write_text(f"#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR {minor}\n")
    (folder / "torch" / "__init__.py").write_text("raise SystemExit('torch must not be imported')")
    return header.parents[2]


@pytest.mark.parametrize("where", ["path file", "user's packages", "named"])
def test_an_isolated_build_sees_the_torch_that_is_there(tmp_path, where):
    folder, options = tmp_path / "elsewhere", {}
    # An environment that sees the system's packages sees the user's: these a test can write.
    build = IsolatedBuild(tmp_path, system_site=where == "user's packages")
    if where == "path file":
        build.add_path_file(folder)
    elif where == "named":
        options = {"UHD_OPS_TORCH_INCLUDE": str(folder / "torch" / "include")}
    else:
        options = {"PYTHONUSERBASE": str(tmp_path)}
        folder = Path(sysconfig.get_path("purelib", "posix_user", {"userbase": str(tmp_path)}))
    include = write_torch(folder, minor=9)
    done = build.run("dist_info", **options)
    assert done.returncode != 0
    assert f"{include} (2.9)" in done.stderr
    assert "Install torch first" in done.stderr
    write_torch(folder, minor=10)
    done = build.run("dist_info", **options)
    assert done.returncode == 0, done.stderr
    assert len(list(build.source.glob(f"uhd_ops-{uhd_ops.__version__}.dist-info"))) == 1


def test_no_torch_is_fetched_where_none_is_seen(tmp_path):
    build = IsolatedBuild(tmp_path)
    done = build.run("dist_info")
    assert done.returncode != 0
    assert "there is no torch that" in done.stderr
    assert "add --no-build-isolation" in done.stderr


def test_a_source_archive_needs_no_torch_and_has_the_plain_version(tmp_path):
    build = IsolatedBuild(tmp_path)
    done = build.run("sdist", "--formats=gztar", UHD_OPS_NO_NATIVE="1")
    assert done.returncode == 0, done.stderr
    archives = [archive.name for archive in (build.source / "dist").iterdir()]
    assert archives == [f"uhd_ops-{uhd_ops.__version__}.tar.gz"]


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """METADATA of a package with kernels."""
    folder = tmp_path_factory.mktemp("metadata")
    build = IsolatedBuild(folder)
    include = write_torch(folder / "elsewhere", minor=10)
    done = build.run("dist_info", UHD_OPS_TORCH_INCLUDE=str(include))
    assert done.returncode == 0, done.stderr
    assert "deprecat" not in done.stderr.lower(), done.stderr
    (path,) = build.source.glob("uhd_ops-*.dist-info/METADATA")
    return email.message_from_bytes(path.read_bytes(), policy=email.policy.default)


def test_metadata_say_who_what_and_for_which_python(metadata):
    assert (metadata["Name"], metadata["Version"]) == ("uhd_ops", uhd_ops.__version__)
    assert metadata["Author"] == "uhd_ops developers"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Summary"] == PROJECT["description"]
    assert metadata["Keywords"].split(",") == PROJECT["keywords"] == sorted(PROJECT["keywords"])
    classifiers = metadata.get_all("Classifier")
    assert classifiers == sorted(classifiers)
    assert {"Typing :: Typed", "Operating System :: POSIX :: Linux"} <= {*classifiers}
    assert any(entry.startswith("Development Status :: ") for entry in classifiers)
    versions = [entry for entry in classifiers if re.search(r":: 3\.\d+$", entry)]
    assert versions[0].endswith(metadata["Requires-Python"].removeprefix(">="))
    # There is no address yet, and an invented one would be somebody else's.
    assert {"Home-page", "Project-URL", "Author-email"}.isdisjoint(metadata.keys())


def test_the_page_of_a_package_names_no_file_that_an_index_lacks(metadata):
    assert metadata["Description-Content-Type"] == "text/markdown"
    page = metadata.get_content()
    assert "```python" in page
    headings = re.compile("^#.*$", re.MULTILINE)
    assert headings.findall(page) == headings.findall((ROOT / "README.md").read_text())
    targets = re.findall(r"\]\(([^)]*)\)|(?:src|srcset|href)=[\"']?([^\"'\s>]*)", page)
    addresses = [one or other for one, other in targets]
    assert [x for x in addresses if not re.match(r"https?://|mailto:|#", x)] == []


def test_every_import_has_an_extra(metadata):
    required = [re.match(r"[\w-]+", entry)[0] for entry in metadata.get_all("Requires-Dist")]
    assert metadata.get_all("Provides-Extra") == [*PROJECT["optional-dependencies"]]
    known = {*sys.stdlib_module_names, "uhd_ops", "uhd_ops_cli"}
    imported = {
        name.split(".")[0]
        for path in (ROOT / "uhd_ops").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in imported_by(node)
    }
    distributions = importlib.metadata.packages_distributions()
    # vLLM calls its plugin, and pins a torch of its own; Ray is installed by .ci/ray_suite.sh.
    installed = {name: distributions.get(name, [name]) for name in imported - known - {"vllm"}}
    assert [name for name, found in installed.items() if not {*found} & {*required}] == []


def imported_by(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []


def test_the_version_stands_in_one_place():
    assert "version" in PROJECT["dynamic"]
    written = re.compile(rf"(?<![\d.]){re.escape(uhd_ops.__version__)}(?![\d.])")
    kinds = ["*.py", "*.toml", "*.txt", "*.cff", "*.in"]
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *kinds],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    found = [x for x in listed if (ROOT / x).exists() and written.search((ROOT / x).read_text())]
    assert found == ["uhd_ops/__init__.py"]
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == uhd_ops.__version__
