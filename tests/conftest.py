"""What every test starts from: 64-bit JAX on 8 host CPU devices, checked array annotations, warnings as errors."""

import contextlib
import gc
import os

# Read once, when JAX first makes its backends. Eight devices on one CPU let the tests of meshes run anywhere; to the
# others they cost nothing (144 tests of operators: 55.6 and 60.8 processor seconds with eight, 57.0 and 58.8 with one).
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import compiles
import durations
import jax
import pytest
from jaxtyping import install_import_hook
from threadpoolctl import threadpool_limits

# Enforces the shapes and dtypes in every annotation of lipjax; must precede its first import.
install_import_hook("lipjax", "beartype.beartype")

jax.config.update("jax_enable_x64", True)
# After JAX has read it, so that it holds for new processes: they keep no programs in the user's home directory.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")

STARTED = pytest.StashKey[float]()


def pytest_collection_modifyitems(items):
    """Marks as slow what took more than 0.4 s of processor time when durations were recorded (tests/durations.json).

    Of a file in which everything is slow the first case of the cheapest function is not: quick runs touch every file.
    """
    for item in durations.slow_items(items):
        item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """What is imported and collected stays: the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    item.stash[STARTED] = durations.processor_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Notes the processor time of a test in its report, where tests/helpers/durations.py finds it."""
    if call.when == "teardown":
        spent = durations.processor_seconds() - item.stash[STARTED]
        item.user_properties.append((durations.PROPERTY, f"{spent:.3f}"))
    return (yield)


@pytest.fixture
def key() -> jax.Array:
    """A typed PRNG key."""
    return jax.random.key(0)


@contextlib.contextmanager
def _x64(on: bool):
    """Sets the flag for the whole process, since the threads of Orbax do not see JAX's thread-local context."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", on)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.fixture(autouse=True)
def _marked_precision(request):
    with _x64("x64_off" not in request.keywords):
        yield


@pytest.fixture(params=["x64", "x32"])
def precision(request, _marked_precision):
    """Runs a test twice, with x64 on and off; its value is "x64" or "x32"."""
    with _x64(request.param == "x64"):
        yield request.param


@pytest.fixture(autouse=True)
def _strict_dtypes(request):
    """An accidental float32 among float64 costs a bound its proof. Ranks may differ: a bias is added to images."""
    theory = request.path.parent.name == "theory" and "mixed_dtypes" not in request.keywords
    with jax.numpy_dtype_promotion("strict" if theory else "standard"):
        yield


@pytest.fixture(autouse=True)
def _quick_compiles(request):
    """Of tests/nn, and of what says so. Proofs and rounding errors are tested of programs as they are used."""
    quick = request.path.parent.name == "nn" or "quick_compiles" in request.keywords
    with compiles.quickly() if quick else contextlib.nullcontext():
        yield


@pytest.fixture
def one_blas_thread():
    """For oracles by dense matrices: two OpenBLAS threads on a busy machine make a QR of 1100 rows take seconds."""
    with threadpool_limits(limits=1, user_api="blas"):
        yield
