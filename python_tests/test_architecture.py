# SPDX-License-Identifier: Apache-2.0
"""The layout holds: one name on every floor, imports go down, references resolve."""

import ast
import doctest
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from battery.marks import native_only
from specs import SPECS

import uhd_ops

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "uhd_ops"

TOP_LEVEL = {
    *("setup.py", "csrc", "uhd_ops", "python_tests", "benchmarks", "examples", "README.md"),
    *("CMakeLists.txt", "pyproject.toml", "Makefile", "LICENSE", "CHANGELOG.md"),
    *("CONTRIBUTING.md", "docs", ".ci", ".gitignore", ".clang-format", "MANIFEST.in"),
    *("requirements-dev.txt", ".github", "CITATION.cff"),
}
# A floor may import the ones below it and those that stand aside; nothing of uhd_ops otherwise.
FLOORS = ("cli", "corpus", "integrations", "retrofit", "nn", "ops", "_native")
ASIDE = {
    "cli": {"", "slicing", "flops", "grids", "plot", "_build_info"},  # "": public names
    "plot": {"slicing", "flops", "grids", "windows", "nn", "ops"},
    "corpus": {"slicing", "grids"},
    "integrations": {"grids", "padded_grids"},
    "retrofit": {"slicing", "flops", "grids", "windows", "_cache"},
    "nn": {"slicing", "grids", "windows", "_cache"},
    "ops": {"_plans", "_sharding", "grids", "padded_grids", "windows", "reference"},
    "_native": {"_sharding"},
    "slicing": {"grids", "_native", "_host"},
    "flops": {"grids", "nn"},
    "grids": {"_native"},
    "reference": set(),
    "_build_info": {"_native", "_host", "ops", "slicing"},
}
ARGUMENTS = PACKAGE / "cli" / "arguments"  # installed as uhd_ops_cli, too
NO_KERNELS = "not _native.has_kernels("
TIMES_DEFINITIONS = "uhd_ops/cli/_bench.py"  # as one of the rivals of an operator
# Files under 25 lines, which are otherwise part of a subject that has a file.
SHORT = {
    "csrc/window_attention/small_windows.h": "between a family of kernels and its dispatcher",
    "csrc/window_attention/large_windows.h": "between a family of kernels and its dispatcher",
    "csrc/window_attention/general_windows.h": "between a family of kernels and its dispatcher",
    "uhd_ops/cli/_info.py": "one command of the command line, as every file beside it",
    "uhd_ops/nn/ablation.py": "a table of the paper, which is read and never run",
}
COMPOSITE = {name for name, spec in SPECS.items() if "native" in spec.exempt}
NATIVE = sorted(set(SPECS) - COMPOSITE)
# What OpSpec documents.
CHECKS = {"batch_invariance", "threads", "memory", "strides", "non_finite"}
CHECKS |= {"second_derivative", "native"}


def sources(*suffixes, under=ROOT):
    """Return the files of the repository: tracked ones, and new ones that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    paths = [ROOT / name for name in listed]
    return sorted(p for p in paths if p.suffix in suffixes and under in p.parents and p.exists())


def relative(path):
    return str(path.relative_to(ROOT))


def assert_none(bad, rule):
    """Fail with every offender, not with the first."""
    assert not bad, "\n".join([rule, *sorted(bad)])


CODE = sources(".py", ".h", ".cpp", ".cu", ".cuh")
PYTHON = [path for path in CODE if path.suffix == ".py"]


def test_top_level():
    listed = {p.relative_to(ROOT).parts[0] for p in sources(*{p.suffix for p in ROOT.rglob("*")})}
    assert listed <= TOP_LEVEL, f"not in the layout: {sorted(listed - TOP_LEVEL)}"
    assert {"setup.py", "csrc", "uhd_ops", "python_tests", "CMakeLists.txt"} <= listed


# The file of a public function has its name on every floor. Functions that are modes of one native
# operator, or have native operators that begin with the name of one folder, share a file with it.
ROOMS = {name: getattr(uhd_ops, name).__module__.rpartition(".")[2] for name in SPECS}
SHARED = sorted({room for name, room in ROOMS.items() if room != name})


@pytest.mark.parametrize("name", SPECS)
def test_one_name_on_every_floor(name):
    assert SPECS[name].name == name
    assert name in uhd_ops.__all__
    assert name in uhd_ops.reference.__all__
    public, definition = getattr(uhd_ops, name), getattr(uhd_ops.reference, name)
    assert public.__module__ == f"uhd_ops.ops.{ROOMS[name]}"
    assert definition.__module__ == f"uhd_ops.reference.{ROOMS[name]}"
    assert SPECS[name].reference is definition
    assert SPECS[name] in vars(importlib.import_module(f"specs.{ROOMS[name]}")).values()
    signatures = [inspect.signature(function).parameters for function in (public, definition)]
    kinds = [[(p.name, p.kind, p.default) for p in s.values()] for s in signatures]
    assert kinds[0] == kinds[1]


FOLDERS = sorted(p.name for p in (ROOT / "csrc").iterdir() if (p / f"{p.name}.cpp").exists())
FOLDERS.remove("host")


def called(room):
    """Return the native operators that the operators of a file call."""
    code = (PACKAGE / "ops" / f"{room}.py").read_text()
    return set(re.findall(r"_native\.operators\.(\w+)", code))


@pytest.mark.parametrize("name", FOLDERS)
def test_native_floor(name):
    # The kernels of an operator, or of a part of one, whose name then has an underscore.
    for suffix in (".h", ".cpp", "_cpu.cpp", "_cuda.cu"):
        assert (ROOT / "csrc" / name / f"{name}{suffix}").is_file(), f"csrc/{name}/{name}{suffix}"
    whole = (PACKAGE / "ops" / f"{name}.py").exists()
    assert whole != any(f"_{name}" in called(room) for room in ROOMS.values())


@pytest.mark.parametrize("name", NATIVE)
def test_operators_stand_on_kernels(name):
    assert ROOMS[name] in FOLDERS or called(ROOMS[name]) & {f"_{folder}" for folder in FOLDERS}


@pytest.mark.parametrize("room", SHARED)
def test_who_shares_a_file_shares_its_operator(room):
    assert sum(shared == room for shared in ROOMS.values()) > 1, "alone: the function's own name"
    forward = {operator for operator in called(room) if not operator.endswith("_backward")}
    assert room in forward
    assert all(operator.removeprefix("_").startswith(room) for operator in forward)
    assert called(room) == forward | {f"_{name.removeprefix('_')}_backward" for name in forward}


def test_no_operator_without_a_spec():
    files = {p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_")}
    assert files == set(ROOMS.values())


@pytest.mark.parametrize("name", SPECS)
def test_exemptions_have_reasons(name):
    assert set(SPECS[name].exempt) <= CHECKS
    assert all(len(reason.split()) >= 4 for reason in SPECS[name].exempt.values())


def imports(path):
    """Return the dotted names of all modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.parent == ARGUMENTS, f"{relative(path)}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor_of(dotted):
    return dotted.split(".")[1] if dotted.count(".") else ""


def test_imports_go_down():
    bad = []
    for path in PYTHON:
        if PACKAGE in path.parents and path.parent != PACKAGE:
            floor = path.relative_to(PACKAGE).parts[0]
            below = set(FLOORS[FLOORS.index(floor) + 1 :]) if floor in FLOORS else set()
            allowed = {floor, "_checks", *below, *ASIDE.get(floor, set())}
            used = {floor_of(name) for name in imports(path) if name.split(".")[0] == "uhd_ops"}
            bad += [f"{relative(path)}: {other or 'uhd_ops'}" for other in sorted(used - allowed)]
    assert_none(bad, "imports of what is not below")


def test_definitions_import_only_torch():
    allowed = {"torch", *sys.stdlib_module_names}
    bad = [
        f"{relative(path)}: {name}"
        for path in (PACKAGE / "reference").glob("*.py")
        for name in imports(path)
        if name.split(".")[0] not in allowed and not name.startswith("uhd_ops.reference.")
    ]
    assert_none(bad, "a definition stands on torch alone")


def test_definitions_are_the_fallback_and_nothing_else():
    # An implementation that leans on its definition would be compared with itself.
    bad = []
    for path in PYTHON:
        aside = path.parent == PACKAGE / "reference" or relative(path) == TIMES_DEFINITIONS
        if PACKAGE in path.parents and not aside:
            fallback = path.parent == PACKAGE / "ops" and not path.stem.startswith("_")
            bad += [f"{relative(path)}: {use}" for use in uses_of_definitions(path, fallback)]
    assert_none(bad, "only `if not _native.has_kernels(...)` in an operator runs a definition")


def uses_of_definitions(path, fallback):
    """Yield the imports and uses of uhd_ops.reference that are no operator's fallback."""
    tree = ast.parse(path.read_text())
    for dotted in imports(path):
        if f"{dotted}.".startswith("uhd_ops.reference."):
            public = path == PACKAGE / "__init__.py" or fallback
            if dotted != "uhd_ops.reference" or not public:
                yield f"import {dotted}"
    guarded = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test).startswith(NO_KERNELS)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "reference" and id(node) not in guarded:
            yield f"line {node.lineno} uses reference"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "uhd_ops.reference":
            yield f"line {node.lineno} uses uhd_ops.reference"


# What is no table of grids: the caller's own tensors, and a model that is being made. Definitions
# import nothing but torch; the command line and corpora move images.
MOVES = {
    "valid.to(coordinates.device, torch.bool)",
    "_made(converted, merges, num_heads).to(kernel.device, kernel.dtype)",
}


def moves_to_a_device(call):
    """Whether a call makes a tensor of numbers on a device, or moves one there."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    options = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name == "to":
        return any("device" in word for word in [*map(ast.unparse, call.args), *options])
    if name in ("tensor", "as_tensor", "asarray"):
        return options.get("device", "'cpu'") != "'cpu'"
    return name in ("cuda", "new_tensor", "pin_memory")


def test_only_the_cache_moves_tensors_of_the_host():
    """A copy from memory that is not pinned waits for all that is queued on the device."""
    found = {
        ast.unparse(call): f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "_cache.py" and not {"reference", "cli", "corpus"} & {*path.parts}
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and moves_to_a_device(call)
    }
    assert [where for call, where in found.items() if call not in MOVES] == []
    assert found.keys() >= MOVES


def test_kernels_are_free_of_torch():
    waiting = [p for p in CODE if p.stem.endswith(("_cpu", "_cuda")) and p.suffix != ".py"]
    assert len(waiting) > 10
    bad, seen = [], set(waiting)
    while waiting:
        file = waiting.pop()
        for name in re.findall(r'#include\s+[<"]([^>"]+)[>"]', file.read_text()):
            if name.startswith(("torch/", "ATen/", "c10/")):
                bad.append(f"{relative(file)}: {name}")
            inner = ROOT / "csrc" / name
            if inner.exists() and inner not in seen:
                seen.add(inner)
                waiting.append(inner)
    assert_none(bad, "included by a kernel")


def test_files_are_licensed():
    marks = {path: "#" if path.suffix == ".py" else "//" for path in CODE}
    wanted = " SPDX-License-Identifier: Apache-2.0\n"
    bad = [relative(p) for p, mark in marks.items() if not p.read_text().startswith(mark + wanted)]
    assert_none(bad, "the first line is the licence")


def test_files_are_no_longer_than_600_lines():
    lengths = {relative(path): len(path.read_text().splitlines()) for path in CODE}
    bad = [f"{name}: {length} lines" for name, length in lengths.items() if length > 600]
    assert_none(bad, "cut by subject")


def test_short_files_have_reasons():
    """A file of a few lines is a corridor: one walks through it to read what happens elsewhere."""
    rooms = [p for p in CODE if p.is_relative_to(PACKAGE) or p.is_relative_to(ROOT / "csrc")]
    lengths = {
        relative(path): len(path.read_text().splitlines())
        for path in rooms
        if path.stem not in ("__init__", "__main__")
    }
    definitions = {f"uhd_ops/reference/{room}.py" for room in ROOMS.values()}  # one for each name
    short = {name for name, length in lengths.items() if length < 25} - definitions
    assert_none(short - SHORT.keys(), "belongs into the file of its subject")
    assert_none(SHORT.keys() - short, "in SHORT, but not short or not there")


PATHS = re.compile(
    r"(?<![\w/.])((?:csrc|uhd_ops|python_tests|benchmarks|examples|docs)/[\w/.-]*\w\.(?:py|h|cpp|cu"
    r"|md|png|jpg|sh))|((?:docs/adr/|ADR[ -])\d{4}[\w-]*)"
)


def test_references_resolve():
    numbers = {path.name[:4] for path in (ROOT / "docs" / "adr").glob("*.md")}
    bad = []
    for path in sources(".py", ".h", ".cpp", ".cu", ".cuh", ".sh", ".md", ".toml", ".txt"):
        for file, adr in PATHS.findall(path.read_text()):
            known = (ROOT / file).exists() if file else re.search(r"\d{4}", adr)[0] in numbers
            if not known:
                bad.append(f"{relative(path)}: {file or adr}")
    assert_none(bad, "named, but not there")


PUBLIC = [name for name in uhd_ops.__all__ if callable(getattr(uhd_ops, name))]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings(name):
    thing = getattr(uhd_ops, name)
    text = inspect.getdoc(thing) or ""
    assert text.splitlines()[0].strip()
    if not inspect.isfunction(thing):
        return
    assert "Returns:" in text
    section = text.partition("Args:")[2].partition("Returns:")[0]
    for parameter in inspect.signature(thing).parameters:
        assert re.search(rf"^\s+{re.escape(parameter)}:", section, re.MULTILINE), parameter
    if name in SPECS:
        assert "Raises:" in text
        assert "Example:" in text


MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sources(".py", under=PACKAGE)
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings(module):
    torch.manual_seed(0)
    loaded = importlib.import_module(module.removesuffix(".__init__"))
    folder = importlib.import_module(loaded.__package__)
    names = {"torch": torch, "uhd_ops": uhd_ops, **vars(folder), **vars(loaded)}
    result = doctest.testmod(loaded, extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert result.attempted
    assert not result.failed


def test_import_is_light():
    heavy = ("timm", "transformers", "PIL", "rich", "matplotlib", "torchvision", "safetensors")
    heavy += ("torch._dynamo", "torch.distributed.tensor")
    code = f"import sys, uhd_ops; print([name for name in {heavy} if name in sys.modules])"
    code += "; print(uhd_ops.integrations.transformers.from_pretrained.__name__)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["[]", "from_pretrained"]
    with pytest.raises(AttributeError, match="has no attribute 'jax'"):
        uhd_ops.integrations.jax  # noqa: B018


# In a process of its own: what was imported and made before would not be seen to be.
JOURNEY = """
import json, pathlib, sys
import torch
from timm.models.vision_transformer import VisionTransformer
import uhd_ops

def own_calls(function):
    calls, package = [], str(pathlib.Path(uhd_ops.__file__).parent)
    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            calls.append(frame.f_code.co_filename.split(", ")[0])  # "file, template in it"
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return [len(calls), len(set(calls))]

vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=8, num_heads=2).eval()
x = torch.randn(1, 3, 32, 32)
inserted = own_calls(lambda: uhd_ops.insert_early_compressor(vit, layer=6))
vit(x)  # fills the caches
print(json.dumps([inserted, own_calls(lambda: vit(x))]))
"""


@native_only("definitions take other ways")
def test_what_a_newcomer_walks_through():
    """Calls of our own functions, and files that they are in: as few as they are, and no more."""
    command = [sys.executable, "-c", JOURNEY]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (insertion, files), (forward, files_of_forward) = json.loads(result.stdout)
    assert 50 < insertion <= 197
    assert 50 < forward <= 110
    assert max(files, files_of_forward) <= 12
