"""What tab completion shows: public names, all of them and nothing else."""

import subprocess
import sys
import types
from typing import Any

import pytest

import lipjax
import lipjax.manifold
import lipjax.models
import lipjax.nn
import lipjax.training
import lipjax.training.data

THEORY = [name for name in lipjax.__all__ if isinstance(getattr(lipjax, name), types.ModuleType)]
MODULES = {
    "lipjax": lipjax,
    **{f"lipjax.{name}": getattr(lipjax, name) for name in (*THEORY, "errors", "manifold", "models", "nn", "training")},
    "lipjax.training.data": lipjax.training.data,
}


@pytest.mark.parametrize("name", MODULES)
def test_completion_shows_public_names_alone(name):
    module = MODULES[name]
    shown = [entry for entry in dir(module) if entry != "__version__"]
    assert set(module.__all__) <= set(shown) and len(set(module.__all__)) == len(module.__all__)
    for entry in shown:
        assert not entry.startswith("_")
        value = getattr(module, entry)
        if isinstance(value, types.ModuleType):
            assert value.__name__.startswith("lipjax."), entry
        if isinstance(value, types.FunctionType | type):
            assert value.__module__.startswith("lipjax.") or value is Any, entry
            assert value.__doc__, f"{name}.{entry} is public and says nothing"
    public = {
        entry
        for entry, value in vars(module).items()
        if isinstance(value, types.FunctionType) and value.__module__ == name and not entry.startswith("_")
    }
    assert public - set(module.__all__) <= HELPERS.get(name, set())


# Functions without an underscore that other modules of lipjax share and users do not need.
HELPERS = {
    "lipjax.activations": {"check_directions"},
}


def test_a_fresh_notebook():
    """In a process that has imported lipjax alone."""
    code = (
        "import lipjax; names = dir(lipjax)\n"
        "assert {'FrozenNetwork', 'freeze', 'spectral', 'operators', '__version__'} <= set(names), names\n"
        "assert not {'os', 'nn', 'models', '_dft', 'jax'} & set(names), names\n"
        "assert 'np' not in dir(lipjax.spectral) and 'soc' in dir(lipjax.parametrize)\n"
        "lipjax.parametrize.soc.exponential\n"
        "import lipjax.nn; assert 'nn' in dir(lipjax)\n"
        "import lipjax.training, sys; assert dir(lipjax.training) == ['load_trained']\n"
        "assert 'orbax' not in sys.modules and 'optax' not in sys.modules\n"
        "assert lipjax.training.load_trained.__doc__ and 'orbax' in str(list(sys.modules))\n"
        "try:\n    lipjax.training.nothing\nexcept AttributeError as error:\n    print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert "has no attribute 'nothing'" in found.stdout
