# SPDX-License-Identifier: Apache-2.0
"""What a host of repositories and an index read: workflows, forms, citation, wheels to be built."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tomllib
import yaml

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CLASSIFIERS = PYPROJECT["project"]["classifiers"]
WHEELS = PYPROJECT["tool"]["cibuildwheel"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
COMMANDS = {"make", "bash", "pip", "pipx", "python", "twine"}
COMMANDS |= {".venv/bin/python", ".venv/bin/uhd-ops"}


def by_name(path):
    return path.name


def steps(path):
    """Return the jobs of a workflow, each with its steps."""
    jobs = yaml.safe_load(path.read_text())["jobs"]
    return [(job, step) for job in jobs.values() for step in job["steps"]]


def missing(line):
    """Return what a command names and what is not there."""
    words = [word for word in shlex.split(line, comments=True) if word]
    bad = [f"command {words[0]}"] if words[0] not in COMMANDS else []
    if words[0] == "make":
        bad += [f"target {word}" for word in words[1:] if word not in TARGETS]
    named = re.findall(r"(?<![\w/.])(\.ci/[\w./-]+|python_tests/[\w./-]+)", line)
    named += re.findall(r"requirements[\w-]*\.txt", line)
    return bad + [f"file {name}" for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", WORKFLOWS, ids=by_name)
def test_workflows_run_what_is_there(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow[True], "when it runs: YAML reads `on` as true"
    bad = []
    for job, step in steps(path):
        assert job["timeout-minutes"] <= 120
        assert ("run" in step) != ("uses" in step)
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
            continue
        subprocess.run(["bash", "-n", "-c", step["run"]], check=True)
        for line in step["run"].strip().splitlines():
            bad += [f"{line}: {name}" for name in missing(line)]
    assert bad == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=by_name)
def test_workflows_use_what_they_define(path):
    known = {"github.ref", "runner.arch"}
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        known |= {f"matrix.{name}" for name in job.get("strategy", {}).get("matrix", {})}
    used = {*re.findall(r"\$\{\{ *([\w.]+) *\}\}", path.read_text())}
    assert used <= known
    for _, step in steps(path):
        version = step.get("with", {}).get("python-version")
        if version:
            assert f"Programming Language :: Python :: {version}" in CLASSIFIERS


def test_what_a_step_names_is_looked_for():
    assert missing("make test") == missing("bash .ci/run") == []
    assert missing("make tset") == ["target tset"]
    assert missing("bash .ci/nothing.sh") == ["file .ci/nothing.sh"]
    assert missing("curl x") == ["command curl"]


@pytest.mark.parametrize("path", [p for p in FORMS if p.name != "config.yml"], ids=by_name)
def test_forms_ask_for_what_is_needed(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "labels", "body"} == {*form}
    fields = {field["id"]: field for field in form["body"]}
    assert len(fields) == len(form["body"])
    for field in fields.values():
        assert field["type"] == "textarea"
        assert field["validations"] == {"required": True}
    if path.name != "idea.yml":
        assert "`uhd-ops info`" in fields["info"]["attributes"]["label"]


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= {*citation}
    assert citation["authors"] == PYPROJECT["project"]["authors"]
    assert f'"{citation["license"]}"' in (ROOT / "setup.py").read_text()
    assert "version" not in citation, "uhd_ops/__init__.py has it"
    sources = (ROOT / "docs" / "training.md").read_text()
    for paper in citation["references"]:
        assert paper["title"].removeprefix("LLaVA-UHD ") in sources
        assert paper["identifiers"][0]["value"].replace(":", " ") in sources


def test_no_address_is_invented():
    listed = [*(ROOT / ".github").rglob("*.yml"), *(ROOT / ".github").rglob("*.md")]
    for path in (*listed, ROOT / "CITATION.cff"):
        assert not re.search(r"https?://|\w@\w+\.\w", path.read_text()), path


def test_wheels_are_built_as_setup_says():
    versions = [re.search(r":: (3\.\d+)$", x) for x in CLASSIFIERS]
    assert WHEELS["build"] == [f"cp{x[1].replace('.', '')}-*" for x in versions if x]
    before = WHEELS["before-build"]
    for requirement in PYPROJECT["build-system"]["requires"]:
        assert re.search(rf"[ ']{re.match('[a-z]+', requirement)[0]}", before), requirement
    oldest = (ROOT / ".ci" / "oldest.txt").read_text()
    assert re.search(r"torch==[\d.]+", before)[0] in oldest
    documented = (ROOT / "setup.py").read_text().partition('"""')[2].partition('"""')[0]
    overrides = WHEELS["overrides"]
    for part in (WHEELS, WHEELS["macos"], *overrides):
        for name in part["environment"]:
            assert name in documented or name == "MACOSX_DEPLOYMENT_TARGET", name
    assert {*WHEELS["test-extras"]} <= {*PYPROJECT["project"]["optional-dependencies"]}
    script = re.fullmatch(r"python \{project\}/(\S+)", WHEELS["test-command"])[1]
    assert (ROOT / script).exists()
    # CUDA for x86-64 alone, as ADR 0014 and the message about a missing library say.
    assert [x["select"] for x in overrides if x["environment"].get("UHD_OPS_CUDA") == "1"] == [
        "*-manylinux_x86_64"
    ]
    for part in (WHEELS, WHEELS["macos"]):
        assert part["environment"]["UHD_OPS_CUDA"] == "0"
    # In both places, nothing of torch or CUDA goes into a wheel.
    excluded = re.findall(r"--exclude '?([\w*.]+)", WHEELS["linux"]["repair-wheel-command"])
    here = re.findall(r"--exclude '?([\w*.]+)", (ROOT / ".ci" / "wheel.sh").read_text())
    assert excluded == here
