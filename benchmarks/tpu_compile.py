"""Compiles the matrix functions for a TPU that is not there, value and gradient: whether they would run on one.

Run: python benchmarks/tpu_compile.py [--topology=v5e:2x2]
Needs libtpu (pip install libtpu), better in an environment of its own: with it installed JAX looks for a TPU.
"""

import importlib.util
import os
import sys
import time

# There is no TPU to be found: libtpu would ask the network for its metadata.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies

from lipjax import linalg
from lipjax.parametrize import cayley

FLAGS = flags.FLAGS
flags.DEFINE_string("topology", "v5e:2x2", "Name of the TPU topology to compile for.")


def cases():
    """(name, function of arrays with a real scalar as value, shapes and dtypes of the arrays)."""
    real = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    transform = lambda w: jnp.sum(linalg.cayley(w).real ** 3)  # noqa: E731
    for m, n in ((32, 32), (64, 32), (32, 64)):
        yield f"cayley, {m} x {n} complex", transform, [jax.ShapeDtypeStruct((17, m, n), jnp.complex64)]
    layer = lambda kernel, alpha: jnp.sum(cayley.response(kernel, alpha, (8, 8)).real ** 3)  # noqa: E731
    yield "cayley layer, 8 x 8", layer, [real(3, 3, 32, 32), real()]
    yield "cayley, real 64 x 32", lambda w: jnp.sum(linalg.cayley(w) ** 3), [real(17, 64, 32)]
    split = lambda re, im: sum(jnp.sum(part**3) for part in linalg.expm_skew_split(re, im))  # noqa: E731
    yield "expm_skew_split, 32 x 32", split, [real(17, 32, 32)] * 2
    yield "expm_skew_split, real 32 x 32", lambda a: jnp.sum(linalg.expm_skew(a) ** 3), [real(17, 32, 32)]


def main(_):
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("libtpu is not installed: pip install libtpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=FLAGS.topology).devices
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    print(f"For {devices[0].device_kind}, jax {jax.__version__}:")
    failures = 0
    for name, function, arrays in cases():
        f = jax.jit(jax.value_and_grad(function, tuple(range(len(arrays)))))
        placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arrays]
        start = time.perf_counter()
        try:
            f.trace(*placed).lower().compile()
            outcome = "compiles"
        except Exception as error:  # whatever the compiler says is what this is here to show
            failures += 1
            outcome = f"FAILS, {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        print(f"{name:<40} {time.perf_counter() - start:6.1f} s  {outcome}", flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    app.run(main)
