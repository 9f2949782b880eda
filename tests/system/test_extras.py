"""A bare installation: without the packages of the extra "train" one sentence names it, and `lipjax check` works."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiers import everyday

from lipjax.errors import MissingExtra, UserError, require_extra

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ("absl", "flax", "matplotlib", "ml_collections", "optax", "orbax", "rich", "tensorflow_datasets", "sklearn")
# Run first, it hides the packages of the extra from every import that follows.
HIDE = f"""
import importlib.abc, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {TRAIN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {TRAIN!r} else real(name, package)
"""


def bare(code, *arguments):
    command = [sys.executable, "-c", HIDE + code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


MODULES = ("nn", "models", "manifold", "interop", "training", "training.data.local", "evaluation", "plan")


@pytest.mark.parametrize("module", everyday(MODULES, "nn", "evaluation"))
def test_a_module_that_needs_more_names_the_extra(module):
    found = bare(f"import lipjax.{module}")
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("lipjax.errors.MissingExtra: This part of lipjax needs")
    assert last.endswith("pip install 'lipjax[train]', or in a clone pip install '.[train]'.")


def test_theory_and_the_checker_need_none_of_it():
    code = """
import numpy as np, lipjax
from lipjax.__main__ import main
assert lipjax.spectral.norm_bound(lipjax.operators.Dense(np.eye(2))) >= 1
name = "digits_liresnet"
assert lipjax.zoo.load(name).in_shape == (8, 8, 1) and main(["zoo", "list"]) == main(["check", f"zoo/{name}"]) == 0
sys.exit(main(["check", "nowhere"]))
"""
    found = bare(code)
    assert found.returncode == 2 and "nowhere" in found.stderr and "lipjax[train]" not in found.stderr


@pytest.mark.parametrize(
    "arguments", everyday([["train"], ["certify", "nowhere"], ["report", "nowhere"], ["predict", "a", "b"]], ["train"])
)
def test_commands_answer_with_one_sentence(arguments):
    found = bare("from lipjax.__main__ import main\nsys.exit(main(sys.argv[1:]))", *arguments)
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert found.stderr.startswith("Error: This part of lipjax needs") and "lipjax[train]" in found.stderr


def test_train_py_answers_with_one_sentence():
    found = bare("import runpy\nrunpy.run_path('train.py', run_name='__main__')")
    assert found.returncode == 1 and "Traceback" not in found.stderr and "lipjax[train]" in found.stderr


def test_what_is_there_is_not_asked_for():
    require_extra("train", "numpy", "flax")
    with pytest.raises(UserError, match="no_such_package.*lipjax\\[train\\]"):
        require_extra("train", "numpy", "no_such_package")
    assert issubclass(MissingExtra, ModuleNotFoundError)
