"""What tests/durations.json says is slow: it names tests that exist, and `-m "not slow"` leaves them out."""

import ast
import pathlib
import subprocess
import sys

import durations

ROOT = pathlib.Path(__file__).resolve().parents[2]


def functions(path):
    names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    return {f"{path.relative_to(ROOT).as_posix()}::{name}" for name in names if name.startswith("test_")}


def test_what_is_recorded_exists():
    known = set().union(*map(functions, (ROOT / "tests").glob("*/test_*.py")))
    assert set(durations.recorded()) - known == set(), "renamed or removed: record durations again"
    assert durations.slow_functions() and len(known) > 500  # control: both are read


def test_times_of_cases_add_up():
    cases = "".join(
        f'<testcase classname="tests.nn.test_a" name="{name}" time="{time}"/>'
        for name, time in (("test_x[1]", 2.0), ("test_x[2]", 1.5), ("test_y", 0.1))
    )
    found = durations.from_junit(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert found == {"tests/nn/test_a.py::test_x": 3.5}


def test_slow_tests_are_left_out():
    slow = max(durations.recorded(), key=durations.recorded().get)
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-o", "addopts=", slow]
    every = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    quick = subprocess.run([*command, "-m", "not slow"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert every.returncode == 0 and slow.partition("::")[2] in every.stdout
    assert quick.returncode == 5 and slow.partition("::")[2] not in quick.stdout  # nothing is left to run
