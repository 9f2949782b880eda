"""What tests/durations.json says is slow: it names tests that exist, and `-m "not slow"` leaves them out."""

import ast
import collections
import pathlib
import re
import subprocess
import sys

import durations
import pytest
from tiers import everyday

ROOT = pathlib.Path(__file__).resolve().parents[2]


def functions(path):
    names = re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)
    return {f"{path.relative_to(ROOT).as_posix()}::{name}" for name in names}


def test_what_is_recorded_exists():
    known = set().union(*map(functions, (ROOT / "tests").glob("*/test_*.py")))
    assert set(durations.recorded()) - known == set(), "renamed or removed: record durations again"
    assert durations.slow_functions() and len(known) > 500  # control: both are read


def test_times_of_cases_add_up():
    cases = "".join(
        f'<testcase classname="tests.nn.test_a" name="{name}" time="9"><properties><property name="other" value="7"/>'
        f'<property name="{durations.PROPERTY}" value="{seconds}"/></properties></testcase>'
        for name, seconds in (("test_x[1]", 2.0), ("test_x[2]", 1.5), ("test_y", 0.1))
    )
    found = durations.from_junit(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert found == {"tests/nn/test_a.py::test_x": 3.5}


def test_slow_tests_are_left_out(tmp_path):
    """Of a file that has both; and the report of a test says how much processor time it took."""
    slow, quick = next(
        (slow, other)
        for slow in sorted(durations.slow_functions())
        if slow.startswith("tests/theory/")
        for other in sorted(functions(ROOT / slow.partition("::")[0]) - set(durations.recorded()))
    )
    options = ["-rA", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "not slow", f"--junitxml={tmp_path / 'r.xml'}"]
    command = [sys.executable, "-m", "pytest", *options, slow, quick]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    passed = {line.split()[1].partition("[")[0] for line in done.stdout.splitlines() if line.startswith("PASSED ")}
    assert done.returncode == 0 and passed == {quick} and "deselected" in done.stdout, done.stdout
    assert f'<property name="{durations.PROPERTY}" value="' in (tmp_path / "r.xml").read_text()


def test_every_file_keeps_a_quick_test():
    item = collections.namedtuple("item", ("nodeid", "keywords", "path"), defaults=((), "a file"))
    slow = max(durations.recorded(), key=durations.recorded().get)
    first, second, nightly = item(f"{slow}[1]"), item(f"{slow}[2]"), item(f"{slow}[3]", ("nightly",))
    assert durations.slow_items([nightly, first, second]) == [nightly, second]
    cheap = item("tests/theory/test_numerics.py::test_that_is_not_listed")
    assert durations.slow_items([nightly, first, second, cheap]) == [nightly, first, second]  # control


def test_cases_that_are_not_of_every_day_are_nightly():
    cases = everyday([("a", 1), ("b", 2)], ("b", 2))
    assert cases[1] == ("b", 2) and cases[0].values == ("a", 1) and cases[0].marks[0].name == "nightly"
    assert everyday(["a", "b"], "a")[1].values == ("b",)
    for chosen in ((), ("c",)):  # a name that is gone, and no test of every day
        with pytest.raises(ValueError, match="Expected some of"):
            everyday(["a", "b"], *chosen)


def names(node):
    return {getattr(part, "id", getattr(part, "attr", None)) for part in ast.walk(node)}


def chosen_in_vain(source):
    """Test functions that are nightly as a whole, or in a module that is, and choose cases of every day."""
    tree, found = ast.parse(source), []
    of_module = [names(node) for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in names(node)]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            marks = of_module + [names(decorator) for decorator in node.decorator_list]
            whole = any("nightly" in mark and "parametrize" not in mark for mark in marks)
            if whole and any("parametrize" in mark and mark & {"everyday", "nightly"} for mark in marks):
                found.append(node.name)
    return found


def test_no_test_that_is_nightly_chooses_cases_of_every_day():
    """The mark of the function is on all its cases: the chosen ones would be left out with the others."""
    files = sorted((ROOT / "tests").glob("*/test_*.py"))
    assert {str(path): found for path in files if (found := chosen_in_vain(path.read_text()))} == {}
    night, cases = "@pytest.mark.nightly\n", '@pytest.mark.parametrize("a", everyday([1, 2], 1))\n'
    by_hand = '@pytest.mark.parametrize("a", [1, pytest.param(2, marks=pytest.mark.nightly)])\n'
    test, module = "def test(a): pass\n", "pytestmark = [pytest.mark.nightly, pytest.mark.x64_off]\n"
    for source in (night + cases + test, cases + night + test, night + by_hand + test, module + cases + test):
        assert chosen_in_vain(source) == ["test"], source
    plain = '@pytest.mark.parametrize("a", [1])\n'
    for source in (cases + test, by_hand + test, night + test, night + plain + test, night + test + cases + test):
        assert chosen_in_vain(source) == [], source
