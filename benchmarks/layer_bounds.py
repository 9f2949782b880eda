"""Proved norms of the layers that models take by name: how far above 1, in how many seconds, and what making one costs.

Run: python benchmarks/layer_bounds.py
     64 channels, 3 x 3 taps, 32 x 32 pixels, as a layer is initialised
Run: python benchmarks/layer_bounds.py --channels=16 --side=8 --layers=aoc,bro

A layer is made in float64 as freezing does. Seconds are of the processor, on one core, compilation not counted.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import math
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from rich.console import Console
from rich.table import Table

import lipjax
from lipjax import operators
from lipjax.nn.by_name import LAYERS
from lipjax.nn.layered import LayeredModel

FLAGS = flags.FLAGS
flags.DEFINE_integer("channels", 64, "Channels in and out.", lower_bound=2)
flags.DEFINE_integer("side", 32, "Pixels of the map, in each direction.", lower_bound=1)
flags.DEFINE_integer("kernel_size", 3, "Taps, in each direction.", lower_bound=1)
flags.DEFINE_list("layers", sorted(LAYERS), "Names of layers.")


class OneLayer(LayeredModel):
    """A convolution by its name, and a head."""

    kernel_size: int = 3

    def layers(self):
        features = self.input_shape[-1]
        layer = self.conv("conv", features, self.kernel_size)
        return [layer, lambda shape, train: [("flatten", operators.Flatten(shape))]], _head


def _head(shape, train):
    return operators.LinearHead(jnp.eye(2, math.prod(shape)), jnp.zeros(2))


def measured(name: str) -> tuple[float, float, float, str]:
    """(largest proved bound of the layer's product - 1, seconds of the proof, seconds to make it, methods)."""
    shape = (FLAGS.side, FLAGS.side, FLAGS.channels)
    model = OneLayer(input_shape=shape, num_classes=2, layer=name, kernel_size=FLAGS.kernel_size)
    variables = model.init(jax.random.key(0), jnp.zeros((1, *shape)))
    frozen = lipjax.freeze(model, variables)
    build = jax.jit(lambda v: model.apply(v, method="build")).lower(variables).compile()
    started = time.process_time()
    jax.block_until_ready(build(variables))
    made = time.process_time() - started
    product, methods, started = 1.0, [], time.process_time()
    for op in frozen.network.ops:
        bound = op.bound()
        product *= bound.proved
        if not bound.method.startswith("exact") or isinstance(op, operators.PotentialStep):
            methods.append(bound.method)
    return product - 1, time.process_time() - started, made, "; ".join(methods)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"expected flags alone, got {argv[1:]}")
    unknown = sorted(set(FLAGS.layers) - set(LAYERS))
    if unknown:
        raise app.UsageError(f"--layers: expected names of {sorted(LAYERS)}, got {unknown}")
    jax.config.update("jax_enable_x64", True)
    title = (
        f"{FLAGS.channels} channels, {FLAGS.kernel_size} x {FLAGS.kernel_size} taps, {FLAGS.side} x {FLAGS.side} pixels"
    )
    table = Table("layer", "proved norm - 1", "proof, s", "making it, s", "by", title=title)
    for name in FLAGS.layers:
        above, proof, made, methods = measured(name)
        table.add_row(name, f"{above:+.1e}", f"{proof:.3f}", f"{made:.3f}", methods)
    Console(width=160).print(table)


if __name__ == "__main__":
    app.run(main)
