# SPDX-License-Identifier: Apache-2.0
"""The faults that .ci/mutants.sh plants: they fit the sources, and none passes for caught."""

from dataclasses import replace

import pytest
from mutants import faults, faults_on_cpu, run
from mutants.faults import Fault
from mutants.run import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.what for fault in FAULTS])
def test_every_fault_fits_the_sources(fault):
    assert fault.planted() != fault.path.read_text()
    assert fault.is_python or fault.source.endswith(("_cuda.cu", ".cpp"))
    assert fault.is_python or (faults.CSRC / fault.source).exists()
    if run.is_test(fault.check):
        file, _, test = fault.check.partition("::")
        assert f"def {test.partition('[')[0]}" in (run.ROOT / file).read_text()
    else:
        assert fault.is_emulated


def test_faults_are_many_and_different():
    assert len(faults.FAULTS) >= 12
    assert len(faults_on_cpu.FAULTS) >= 20
    assert len({fault.what for fault in FAULTS}) == len(FAULTS)
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)


# A build whose compiler and linker are cp, and whose kernel is a shell script.
NINJA_FILE = """\
rule compile
  command = sh {folder}/compile {csrc}/a/a_cuda.cu $out
rule link
  command = : && cp $in -T $out && :
build CMakeFiles/kernels_emulated.dir/csrc/a/a_cuda.cu.o: compile
build uhd_cuda_driver: link CMakeFiles/kernels_emulated.dir/csrc/a/a_cuda.cu.o
"""
COMPILER = "if grep -q no-such-word $1; then echo an error; exit 1; fi; cp $1 $2; chmod +x $2\n"
KERNEL = "#!/bin/sh\n# a comment\necho all is well\nexit 0\n"
GOOD = Fault("a good one", "a/a_cuda.cu", "all is well", "FAILED a case: it is wrong", "a case")


@pytest.fixture
def run_faults(tmp_path, monkeypatch, capfd):
    """Return a function that plants faults in that kernel: the exit code, and what was printed."""
    csrc, build = tmp_path / "csrc", tmp_path / "build"
    for folder in (csrc / "a", build):
        folder.mkdir(parents=True)
    (tmp_path / "compile").write_text(COMPILER)
    (build / "build.ninja").write_text(NINJA_FILE.format(folder=tmp_path, csrc=csrc))
    monkeypatch.setattr(faults, "CSRC", csrc)
    monkeypatch.setattr(run, "CSRC", csrc)
    monkeypatch.setattr(run, "ROOT", tmp_path)

    def plant(*planted, kernel=KERNEL):
        (csrc / "a" / "a_cuda.cu").write_text(kernel)
        monkeypatch.setattr(run, "FAULTS", planted)
        sound = build / run.DRIVER
        sound.write_text(kernel)
        sound.chmod(0o755)
        code = run.main(str(build))
        assert (csrc / "a" / "a_cuda.cu").read_text() == sound.read_text() == kernel
        return code, capfd.readouterr().out

    return plant


def test_a_fault_is_caught_by_what_the_check_says_and_how_it_ends(run_faults):
    wrong = "echo FAILED a case: it is wrong; exit 1"
    code, said = run_faults(replace(GOOD, old="exit 0", new=wrong))
    assert code == 0
    assert "caught a good one" in said
    assert "FAILED a case: it is wrong" in said
    assert "1 of 1 faults were caught" in said
    code, said = run_faults(replace(GOOD, old="exit 0", new="kill -SEGV $$"))
    assert code == 0
    assert "ended by signal 11: all is well" in said


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("a comment", "another comment", '"a case" passes'),
        ("all is well", "FAILED a case, and yet all is well", '"a case" passes'),
        ("exit 0", "exit 1", '"a case" ended with 1'),  # without a word
        ("exit 0", "echo FAILED a case; exit 2", '"a case" ended with 2'),  # of a wrong usage
        ("a comment", "no-such-word", "an error"),  # of the compiler
        ("what is not there", "", "has it 0 times:\nwhat is not there"),
        ("ll", "", "has it 2 times"),
    ],
)
def test_a_fault_is_missed(run_faults, old, new, why):
    wrong = replace(GOOD, what="a bad one", old=old, new=new)
    caught = replace(GOOD, old="exit 0", new="echo FAILED a case; exit 1")
    code, said = run_faults(caught, wrong)
    assert code == 1
    assert "caught a good one" in said
    assert "MISSED a bad one" in said
    assert why in said
    assert "1 of 2 faults were caught" in said


def test_a_check_that_fails_without_a_fault_proves_nothing(run_faults):
    kernel = KERNEL.replace("exit 0", "echo FAILED a case; exit 1")
    code, said = run_faults(replace(GOOD, old="a comment", new="a fault"), kernel=kernel)
    assert code == 1
    assert "WRONG  without a fault: FAILED a case" in said


def test_no_fault_is_no_success(run_faults):
    assert run_faults()[0] == 1


TESTS = """
from uhd_ops import answer

def test_answer():
    assert answer() == 42
"""


def test_a_fault_in_python(tmp_path, monkeypatch, capfd):
    package, tests, build = (tmp_path / name for name in ("uhd_ops", "python_tests", "build"))
    for folder in (package, tests, build):
        folder.mkdir()
    (package / "__init__.py").write_text("def answer():\n    return 6 * 7  # of course\n")
    (tests / "test_answer.py").write_text(TESTS)
    for name in (run.LIBRARY, run.HOST, "build.ninja"):
        (build / name).touch()
    monkeypatch.setattr(faults, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "PRELOADED", ["pytest"])
    check = f"{tests.name}/test_answer.py::test_answer"
    good = Fault("a good one", "uhd_ops/__init__.py", "7", "9", check)
    fatal = replace(good, what="a fatal one", old="6 * 7", new="__import__('os').abort()")
    missed = replace(good, what="a bad one", old="of course", new="sure")
    unknown = replace(missed, what="an unknown one", check=f"{check}_to_all")
    monkeypatch.setattr(run, "FAULTS", [good, fatal, missed])
    assert run.main(str(build)) == 1
    said = capfd.readouterr().out
    assert "caught a good one" in said
    assert "caught a fatal one" in said
    assert "ended by signal 6" in said
    assert "MISSED a bad one" in said
    assert "2 of 3 faults were caught" in said
    monkeypatch.setattr(run, "FAULTS", [unknown])
    with pytest.raises(RuntimeError, match="ended with 4"):  # there is no such test
        run.main(str(build))
