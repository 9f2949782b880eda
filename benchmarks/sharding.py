"""The work of a training step that needs no images, on one device and on eight: operations per device, and traffic.

Run: python benchmarks/sharding.py [--cases=cayley,soc] [--devices=8] [--model=1]
Nothing is run: the compiled programs of parametrisation, norm estimates and their gradients are read. "share" is that
of one device in what one device alone would do (1/8 at best): of all operations as XLA counts them, which counts the
body of a loop once, and of those of matrix products and convolutions alone, loops by their length (`plan.hlo`).
There are no calls of linear algebra libraries, of which XLA would not know the operations, where these matrix functions
run on CPUs: such calls are listed if there are any.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=256")

import collections
import re

import jax
from absl import app, flags

from lipjax.models import get_model
from lipjax.plan.hlo import Program
from lipjax.training import optimizer as optimizers
from lipjax.training import sharding, step
from lipjax.training.config import default_config

# By name: (config.model, (h, w, c) of the images, other fields).
CIFAR = (32, 32, 3)
CASES = {
    "cayley": ({"name": "lipconvnet", "depth": 5, "layer": "cayley"}, CIFAR, {}),
    "cayley_10": ({"name": "lipconvnet", "depth": 10, "layer": "cayley"}, CIFAR, {}),
    "soc": (
        {"name": "lipconvnet", "depth": 5, "padding": "CIRCULAR", "form": "response", "train_terms": None},
        CIFAR,
        {},
    ),
    "soc_5_terms": ({"name": "lipconvnet", "depth": 5, "padding": "CIRCULAR", "form": "response"}, CIFAR, {}),
    "cholesky": (
        {"name": "liresnet", "depth": 2, "width": 64, "neck": "cholesky", "neck_features": 1024, "dense_depth": 16},
        CIFAR,
        {},
    ),
    "estimates": ({"name": "liresnet", "depth": 16, "width": 128}, CIFAR, {"power_iterations": 10}),
    "liplt": ({"name": "convnet", "variant": "6c2f"}, CIFAR, {"lipschitz": "liplt"}),
}


def config_of(name: str):
    """(config, image shape) of a case."""
    model, shape, fields = CASES[name]
    config = default_config()
    config.model = type(config)(model)
    config.update_from_flattened_dict({"loss.name": "emma", **fields})
    return config.lock(), shape


def compiled_build(config, shape, mesh):
    """Compiles what a training step does without images, and its gradient; arrays are abstract."""
    model = get_model(config.model, input_shape=shape, num_classes=10)
    optimizer = optimizers.make_optimizer(config.optimizer, 100, 10)
    abstract = jax.eval_shape(lambda: step.init_state(model, optimizer, jax.random.key(0), config.lipschitz))
    build = step.make_build(model, config, mesh)

    def placed(tree, shardings):
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)

    state: step.TrainState = placed(abstract, sharding.state_shardings(abstract, mesh))
    params, lip = state.params, state.lip
    built = jax.eval_shape(build, params, lip)[0]
    cotangents = placed(built, jax.tree.map(lambda _: sharding.replicated(mesh), built))

    @sharding.spread_over(mesh)
    def both_ways(params, lip, cotangents):
        built, pull_back, lip = jax.vjp(lambda params: build(params, lip), params, has_aux=True)
        return built, sharding.stored(pull_back(cotangents)[0], mesh), lip

    return jax.jit(both_ways).lower(params, lip, cotangents).compile()


def describe(compiled) -> dict:
    """Operations of a device by both counts, collectives by kind, calls of libraries."""
    text = compiled.as_text()
    program = Program(text)
    collectives = collections.defaultdict(lambda: [0, 0])
    for found in program.collectives():
        collectives[found.kind][0] += found.times
        collectives[found.kind][1] += found.times * found.bytes
    calls = collections.Counter(re.findall(r'custom_call_target="([^"]*)"', text))
    flops = compiled.cost_analysis()["flops"]
    return {"flops": flops, "products": sum(program.flops().values()), "collectives": collectives, "calls": calls}


def main(argv):
    del argv
    # Compiles several times faster; products and collectives are the same.
    jax.config.update("jax_disable_most_optimizations", True)
    print(f"jax {jax.__version__}, {FLAGS.devices} devices, of which {FLAGS.model} along model")
    for name in FLAGS.cases or CASES:
        config, shape = config_of(name)
        one, many = (
            describe(compiled_build(config, shape, sharding.make_mesh(count // model, FLAGS.devices, model)))
            for count, model in ((1, 1), (FLAGS.devices, FLAGS.model))
        )
        shares = ", ".join(f"{kind} {many[kind] / max(one[kind], 1):.4f}" for kind in ("flops", "products"))
        print(f"{name}: of {one['flops'] / 1e9:.2f} ({one['products'] / 1e9:.2f}) GFLOP a device does: {shares}")
        for kind, (times, size) in sorted(many["collectives"].items()):
            print(f"    {times:4d} {kind}, {size / 1e6:.1f} MB")
        if one["calls"] or many["calls"]:
            print(f"    calls: {dict(one['calls'])}, {dict(many['calls'])}")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_list("cases", [], f"Which of {', '.join(CASES)}; all if none is named.")
    flags.DEFINE_integer("devices", 8, "How many devices to compare with one, at most 256.")
    flags.DEFINE_integer("model", 1, "Along how many of them what is trained is stored in parts.")
    app.run(main)
