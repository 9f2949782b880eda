"""The arrows between rooms: a room imports only rooms before it, and theory nothing of Flax, optax, Orbax or TFDS."""

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each room may import the rooms of earlier rows (and itself). A new module needs a place here.
ROWS = (
    ("_streams",),
    ("errors", "checker", "_spread"),
    ("_arithmetic", "_power", "_dft", "_cholesky", "_parts"),
    ("linalg", "conv", "activations", "_verified"),
    ("_symbol", "_series", "pooling"),
    ("spectral",),
    ("operators",),
    ("_float32_sums",),
    ("parametrize", "network", "curvature", "_host_map", "_liplt_path"),
    ("_chains", "_liplt"),
    ("_liplt_bound",),
    ("bounds",),
    ("certify",),
    ("losses", "_mlp", "_float32", "_float64", "_layout"),
    ("frozen", "attacks", "nn"),
    ("document", "deployment"),
    ("models",),
    ("interop",),
    ("training",),
    ("__main__",),
)
RANK = {room: rank for rank, row in enumerate(ROWS) for room in row}
THEORY = {room for row in ROWS[: RANK["frozen"]] for room in row}

THEORY_PACKAGES = {"jax", "numpy", "scipy", "jaxtyping", "threadpoolctl"}
# What a room may import from outside; a room that is not listed may import anything.
PACKAGES = dict.fromkeys(THEORY, THEORY_PACKAGES) | {
    "frozen": THEORY_PACKAGES | {"safetensors"},
    "document": THEORY_PACKAGES | {"safetensors"},
    "deployment": THEORY_PACKAGES,
    "attacks": THEORY_PACKAGES,
    "nn": THEORY_PACKAGES | {"flax"},
    "models": THEORY_PACKAGES | {"flax"},
    "checker": {"numpy", "safetensors"},
}
HEAVY = ("flax", "optax", "orbax", "tensorflow_datasets", "grain", "matplotlib", "rich", "ml_collections", "sklearn")


def imported(tree, package):
    """Full names of the modules that a syntax tree imports; `package` is the one relative imports start from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(name, source, package=None):
    """What the module `name` ("lipjax.operators") imports against the arrows, as readable lines."""
    room, package = name.split(".")[1], package or name.rpartition(".")[0]
    allowed = PACKAGES.get(room)
    for target in imported(ast.parse(source), package):
        top, *rest = target.split(".")
        if top == "lipjax":
            if room == "checker":
                yield f"{name} imports {target}, but it stands alone"
            elif rest and rest[0] != room and RANK.get(rest[0], RANK["__main__"] + 1) >= RANK[room]:
                yield f"{name} imports {target}, which comes later"
        elif allowed is not None and top not in allowed and top not in sys.stdlib_module_names:
            yield f"{name} imports {target}, which its room may not"


def module_name(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def package_of(name, path):
    return name if path.name == "__init__.py" else name.rpartition(".")[0]


MODULES = {module_name(path): path for path in sorted((ROOT / "lipjax").rglob("*.py"))}
ROOMED = [name for name in MODULES if name != "lipjax"]


@pytest.mark.parametrize("name", ROOMED)
def test_a_module_imports_only_what_its_room_may(name):
    room = name.split(".")[1]
    assert room in RANK or room == "checker", f"{name} has no place in ROWS: give it one"
    path = MODULES[name]
    assert list(violations(name, path.read_text(), package_of(name, path))) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("lipjax.spectral", "import flax"),
        ("lipjax.conv", "def late():\n    from lipjax.operators import Dense"),
        ("lipjax.conv", "from . import spectral"),
        ("lipjax.parametrize.soc", "from ..network import Network"),
        ("lipjax.frozen", "from lipjax import nn"),
        ("lipjax.nn.layers", "import optax"),
        ("lipjax.nn.layers", "from lipjax.models import get_model"),
        ("lipjax.losses", "import lipjax.training.step"),
        ("lipjax.checker", "from lipjax.errors import UserError"),
        ("lipjax.checker", "import jax"),
    ],
)
def test_a_wrong_import_is_noticed(name, source):
    assert list(violations(name, source))


def test_no_module_needs_itself():
    graph = {}
    for name, path in MODULES.items():
        # Imports inside functions run later, and are how a cycle is broken.
        body = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.FunctionDef)]
        targets = imported(ast.Module(body, []), package_of(name, path))
        graph[name] = {found for target in targets if (found := module_of(target)) and found != name}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    with pytest.raises(graphlib.CycleError):  # control
        list(graphlib.TopologicalSorter(graph | {"lipjax.errors": {"lipjax.spectral"}}).static_order())


def module_of(target):
    """The module that a full name from `imported` is, or is in; None outside lipjax."""
    parent = target.rpartition(".")[0]
    return target if target in MODULES else parent if parent in MODULES else None


def loaded_by(statement):
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return set(json.loads(process.stdout.splitlines()[-1]))


def test_importing_lipjax_loads_theory_alone():
    assert loaded_by("import lipjax") & set(HEAVY) == set()
    assert {"flax"} <= loaded_by("import lipjax.nn")  # control
