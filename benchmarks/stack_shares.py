"""The share of one device of 8 to 256 in the matrix functions of a stack of matrices, as compiled, with its gradient.

Run: python benchmarks/stack_shares.py [--functions=cayley,cholesky] [--devices=8,16,64,256] [--to=FILE]
Nothing is run: the products of the compiled programs are counted, loops by their length (`plan.hlo`). Eight matrices of
256 in panels of 8 columns stand for eight of 2048 in panels of 64, which take far longer to compile. One line of JSON:
name of a function -> shares, one for each number of devices. --to: the same with commit and hardware, for
docs/pictures.py.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=256")

import json
import pathlib

import jax
import jax.numpy as jnp
from absl import app, flags
from compare import provenance

from lipjax import _spread, linalg
from lipjax.files import write_json
from lipjax.plan.hlo import Program
from lipjax.training import sharding

FUNCTIONS = {
    "cayley": linalg.cayley,
    "expm": lambda w: linalg.expm_skew_split(w - jnp.swapaxes(w, -1, -2))[0],
    "cholesky": linalg.cholesky_orthogonalize,
    "reflector": lambda w: linalg.block_reflector(w[..., :128], 1e-3),
}


def products(function, devices: int) -> float:
    """The operations of matrix products of one device, forward and backward."""
    mesh = sharding.make_mesh(devices, devices)

    @jax.jit
    @sharding.spread_over(mesh)
    def both_ways(w):
        found, pull_back = jax.vjp(function, w)
        return sharding.gathered((found, pull_back(jnp.cos(found))), mesh)

    w = jax.ShapeDtypeStruct((8, 256, 256), jnp.float32, sharding=sharding.replicated(mesh))
    text = both_ways.lower(w).compile().as_text()
    if text is None:
        raise ValueError("Expected a compiled program whose text JAX can tell.")
    return sum(Program(text).flops().values())


def main(argv):
    del argv
    # Compiles several times faster; products are the same.
    jax.config.update("jax_disable_most_optimizations", True)
    _spread.SMALL = _spread.SMALL_IN_COLUMNS = 0
    _spread.PANEL = 8
    devices = [int(count) for count in FLAGS.devices]
    about = {**provenance(), "jax": jax.__version__}
    shares = {}
    for name in FLAGS.functions or FUNCTIONS:
        one, *many = (products(FUNCTIONS[name], count) for count in (1, *devices))
        shares[name] = [found / one for found in many]
    if FLAGS.to:
        write_json(pathlib.Path(FLAGS.to), {"devices": devices, "shares": shares, **about})
    print(json.dumps(shares))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_list("functions", [], f"Which of {', '.join(FUNCTIONS)}; all if none is named.")
    flags.DEFINE_list("devices", ["8", "16", "64", "256"], "How many devices to compare with one, each at most 256.")
    flags.DEFINE_string("to", "", "A file to write, such as benchmarks/results/stack_shares.json.")
    app.run(main)
