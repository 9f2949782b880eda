"""The arrows between rooms and inside them: a module imports only what stands above it, theory no training package."""

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each room may import the rooms of earlier rows. A new room needs a place here.
ROWS = (
    ("checker", "streams", "_precision"),
    ("_spread",),
    ("errors", "_dft", "activations"),
    ("files", "linalg", "conv", "numerics", "pooling"),
    ("spectral",),
    ("operators",),
    ("parametrize", "network", "curvature"),
    ("bounds", "attacks", "shipping"),
    ("certify", "losses"),
    ("zoo",),
    ("manifold", "nn"),
    ("models",),
    ("interop", "training"),
    ("evaluation", "plan"),
    ("run",),
    ("command", "zoo_command"),
    ("__main__",),
)
# Inside a room of several modules likewise: each row may import the rows before it. "html" is evaluation/html/.
INSIDE = {
    "linalg": (("parts", "unit"), ("cholesky",), ("reflectors",), ("functions",), ("orthogonal_steps",)),
    "conv": (("blocks", "maps", "response"), ("series",)),
    "spectral": (("arguments", "arithmetic", "verified"), ("estimates", "row_sums", "series", "symbol"), ("norms",)),
    "operators": (
        ("chain", "text"),
        ("base",),
        ("channelwise", "circular", "exponential", "linear", "pairs", "reshape", "softplus", "training_only"),
        ("elementwise", "grid", "heads", "one_tap", "potential", "residual", "tokens"),
    ),
    "parametrize": (
        ("aol", "bjorck", "bro", "cayley", "cholesky", "exponential", "lln", "lot", "residual", "soc_frequency"),
        ("aoc", "sll", "soc", "soc_forms"),
        ("bcop", "cpl", "sandwich"),
    ),
    "bounds": (
        ("product", "host_map", "liplt_path"),
        ("chains", "sweeps"),
        ("liplt_proof",),
        ("liplt",),
    ),
    "attacks": (("input_gradient",), ("lipschitz_search",), ("pgd",), ("square",), ("search",)),
    "certify": (
        ("certificate", "float32_sums", "float64", "layout", "radius"),
        ("float32_merging", "mlp"),
        ("float32", "frozen"),
        ("deployment", "document", "freezing"),
    ),
    "losses": (("logits",), ("balls", "radii", "transport")),
    "shipping": (
        ("onnx_graph", "torch_state"),
        ("onnx_registry",),
        ("onnx_activations", "onnx_linear", "onnx_moves"),
        ("onnx_file",),
    ),
    "zoo": (("cards", "library"), ("adding", "fetching")),
    "nn": (
        ("channelwise", "layers"),
        ("cholesky", "explicit", "model", "orthogonal", "potential", "responses", "scaled", "tokens"),
        ("group_shuffle", "nnx"),
        ("by_name",),
        ("layered",),
    ),
    "models": (
        (
            "bronet",
            "compared",
            "concatnet",
            "convnet",
            "lipconvnet",
            "lipnext",
            "liresnet",
            "patchnet",
            "potentialnet",
            "sandwichnet",
            "stagednet",
        ),
    ),
    "interop": (
        ("assembly", "entries"),
        ("comparison",),
        ("bronet", "compared", "crm", "lipconvnet", "liresnet", "potentialnet", "sandwichnet", "stagednet"),
        ("onnx_nodes", "sequential"),
        ("onnx_graphs",),
    ),
    "training": (
        ("augment", "clock", "compile_alarm", "compile_cache", "damage", "randaugment", "setting"),
        ("sharding", "stopping", "terminal"),
        ("accumulate", "cluster", "metrics", "objective", "optimizer"),
        ("checkpoint", "choices", "guard", "lock"),
        ("step",),
        ("data", "restoring"),
        ("checks", "config", "config_file"),
        ("best", "config_reference", "export", "same_run"),
        ("prepare", "warm_start"),
        ("loop",),
        ("trained",),
    ),
    "evaluation": (
        ("classes", "falsify", "progress", "records"),
        ("compare", "table"),
        ("attack_files",),
        ("html",),
        ("evaluate", "predict"),
        ("attack_command",),
    ),
    "plan": (("chips", "flops", "gpus"), ("hlo",), ("plan",), ("table",), ("command",)),
}
RANK = {room: rank for rank, row in enumerate(ROWS) for room in row}
INSIDE_RANK = {room: {name: rank for rank, row in enumerate(rows) for name in row} for room, rows in INSIDE.items()}
THEORY = {room for row in ROWS[: RANK["nn"]] for room in row}

THEORY_PACKAGES = {"jax", "numpy", "scipy", "jaxtyping", "threadpoolctl"}
# What a room may import from outside; a room that is not listed may import anything.
PACKAGES = dict.fromkeys(THEORY, THEORY_PACKAGES) | {
    "files": THEORY_PACKAGES | {"safetensors"},
    "certify": THEORY_PACKAGES | {"safetensors"},
    "zoo": THEORY_PACKAGES | {"safetensors"},
    "manifold": THEORY_PACKAGES | {"optax"},
    "shipping": THEORY_PACKAGES | {"onnx"},
    "nn": THEORY_PACKAGES | {"flax"},
    "models": THEORY_PACKAGES | {"flax"},
    "checker": {"numpy", "safetensors"},
}
HEAVY = ("flax", "optax", "orbax", "tensorflow_datasets", "grain", "matplotlib", "rich", "ml_collections", "sklearn")


def imported(tree, package):
    """Full names of the modules that a syntax tree imports, in functions too; relative ones start from `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(name, source, package=None):
    """What the module `name` ("lipjax.operators.linear") imports against the arrows, as readable lines."""
    _, room, *inside = name.split(".")
    package = package or name.rpartition(".")[0]
    allowed = PACKAGES.get(room)
    for target in imported(ast.parse(source), package):
        top, *rest = target.split(".")
        if top == "lipjax":
            if room == "checker":
                yield f"{name} imports {target}, but it stands alone"
            elif rest and rest[0] != room and RANK.get(rest[0], RANK["__main__"] + 1) >= RANK[room]:
                yield f"{name} imports {target}, which comes later"
            elif rest and rest[0] == room and inside and not stands_before(room, rest[1:], inside[0]):
                yield f"{name} imports {target}, which does not stand before it in its room"
        elif allowed is not None and top not in allowed and top not in sys.stdlib_module_names:
            yield f"{name} imports {target}, which its room may not"


def stands_before(room, target, module):
    """Whether `module` of a room may import what `target` (names below the room) says."""
    rank = INSIDE_RANK[room]
    if not target or target[0] not in rank:  # the room's own front door, which imports all of its modules
        return False
    return target[0] == module or rank[target[0]] < rank[module]


def module_name(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def package_of(name, path):
    return name if path.name == "__init__.py" else name.rpartition(".")[0]


MODULES = {module_name(path): path for path in sorted((ROOT / "lipjax").rglob("*.py"))}
ROOMED = [name for name in MODULES if name != "lipjax"]


@pytest.mark.parametrize("name", ROOMED)
def test_a_module_imports_only_what_its_room_may(name):
    _, room, *inside = name.split(".")
    assert room in RANK, f"{name} has no place in ROWS: give it one"
    if inside:
        assert inside[0] in INSIDE_RANK[room], f"{name} has no place in INSIDE[{room!r}]: give it one"
    path = MODULES[name]
    assert list(violations(name, path.read_text(), package_of(name, path))) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("lipjax.spectral.norms", "import flax"),
        ("lipjax.conv", "def late():\n    from lipjax.operators import Dense"),
        ("lipjax.conv", "from . import spectral"),
        ("lipjax.parametrize.soc", "from ..network import Network"),
        ("lipjax.certify.frozen", "from lipjax import nn"),
        ("lipjax.nn.layers", "import optax"),
        ("lipjax.nn.layers", "from lipjax.models import get_model"),
        ("lipjax.nn.layers", "from lipjax.nn.model import LipschitzModel"),
        ("lipjax.losses", "import lipjax.training.step"),
        ("lipjax.checker", "from lipjax.errors import UserError"),
        ("lipjax.checker", "import jax"),
        ("lipjax.spectral.verified", "from lipjax.spectral.norms import norm_bound"),
        ("lipjax.spectral.verified", "from lipjax.spectral import norm_bound"),
        ("lipjax.plan.plan", "def late():\n    from lipjax.plan.table import table"),
        ("lipjax.training.step", "from lipjax.training.loop import Run"),
        ("lipjax.training.config", "from lipjax.evaluation.table import print_table"),
    ],
)
def test_a_wrong_import_is_noticed(name, source):
    assert list(violations(name, source))


def test_no_module_needs_itself():
    graph = {}
    for name, path in MODULES.items():
        targets = imported(ast.parse(path.read_text()), package_of(name, path))  # in functions, too
        graph[name] = {found for target in targets if (found := module_of(target)) and found != name}
        graph[name].discard("lipjax.training")  # its one name is looked up on demand
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
