"""Group-and-shuffle layers against the original code (golden files), and what they are as operators."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_helpers import hwio, load, nhwc, relative
from tiers import everyday

import lipjax
from lipjax import bounds
from lipjax.nn import COLLECTION, SOC, GroupAndShuffle, LinearHead, LipschitzModel, flatten

PARITY = 1e-9
VECTORS = ("u1", "v1", "u2", "v2", "u3", "v3", "u4", "v4")


def layer_of(case):
    """The module, its variables, and the golden arrays."""
    z, meta = load(f"gs_{case}")
    c = meta["constructor"]
    options = {"kernel_size": c["kernel_size"], "strides": c["stride"], "paired": c["paired"], "activation": None}
    module = GroupAndShuffle(c["out_channels"], groups=c["groups"][0], pointwise_groups=c["groups"][1], **options)
    params, state = {}, {}
    for ours, theirs in (("spatial", "soc1"), ("pointwise", "soc2")):
        kernel, bias = z[f"param/{theirs}.random_conv_filter"], z[f"param/{theirs}.bias"]
        params[ours] = {"kernel": hwio(kernel), "bias": jnp.asarray(bias)}
        state[ours] = {"kernel_vectors": {name: hwio(z[f"param/{theirs}.{name}"]) for name in VECTORS}}
    return module, {"params": params, COLLECTION: state}, z


def apply(module, variables, x, train):
    ops, _ = module.apply(variables, x.shape[1:], train, mutable=[COLLECTION])
    for _, op in ops:
        x = op(x)
    return x


@pytest.mark.parametrize(
    "case", everyday(["soc_accelerated_paired", "soc_accelerated_s2", "soc"], "soc_accelerated_paired")
)
def test_layers_of_the_original(case):
    """soc: there the result of the second shuffle is thrown away, and without one ours is the same function."""
    module, variables, z = layer_of(case)
    if case == "soc":
        module = module.clone(shuffle_between=False)
    x, cotangent = nhwc(z["input/x"]), nhwc(z["input/cotangent"])
    assert relative(jax.jit(lambda v, x: apply(module, v, x, False))(variables, x), nhwc(z["output/y_eval"])) < PARITY

    @jax.jit
    def run(params, x, cotangent):
        y, pull = jax.vjp(lambda p, x: apply(module, {**variables, "params": p}, x, True), params, x)
        return y, pull(cotangent)

    y, (grads, grad_x) = run(variables["params"], x, cotangent)
    assert relative(y, nhwc(z["output/y"])) < PARITY and relative(y, nhwc(z["output/y_eval"])) > PARITY
    assert relative(grad_x, nhwc(z["output/grad_x"])) < PARITY
    for ours, theirs in (("spatial", "soc1"), ("pointwise", "soc2")):
        wanted = hwio(z[f"output/grad/{theirs}.random_conv_filter"])
        # A normalised skew 2 x 2 matrix is constant: zero to rounding there, and so are both.
        assert np.abs(grads[ours]["kernel"] - wanted).max() < PARITY * max(1.0, float(np.abs(wanted).max()))
        assert relative(grads[ours]["bias"], z[f"output/grad/{theirs}.bias"]) < PARITY
    # Control: the shuffle between the layers matters.
    other = module.clone(shuffle_between=not module.shuffle_between)
    assert relative(apply(other, variables, x, False), nhwc(z["output/y_eval"])) > 0.1


class Net(LipschitzModel):
    def layers(self):
        first = GroupAndShuffle(8, 3, 2, 2, 4, eval_terms=12, name="first")
        second = GroupAndShuffle(8, 3, 1, 4, 2, paired=True, padding="CIRCULAR", name="second")
        return [first, second, SOC(8, groups=8, name="depthwise"), flatten], LinearHead(3, name="head")


@pytest.mark.nightly
def test_a_network_trains_freezes_and_certifies():
    model = Net((6, 6, 2), 3)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 6, 6, 2)))
    shapes = {name: variables["params"]["first"][name]["kernel"].shape for name in ("spatial", "pointwise")}
    assert shapes == {"spatial": (2, 3, 3, 4, 4), "pointwise": (4, 1, 1, 2, 2)}

    @functools.partial(jax.jit, static_argnums=1)
    def built(variables, train):
        return model.apply(variables, train, method="build", mutable=[COLLECTION])

    network, changed = built(variables, True)
    assert [name for name in network.names if name.startswith("first")] == [
        "first/shuffle",
        "first/spatial/spacetodepth",
        "first/spatial/linear",
        "first/spatial/bias",
        "first/shuffle_between",
        "first/pointwise/linear",
        "first/pointwise/bias",
        "first/activation",
    ]
    before, after = (lip["first"]["spatial"]["kernel_vectors"]["u1"] for lip in (variables[COLLECTION], changed["lip"]))
    assert before.shape == after.shape and before.shape[0] == 2
    sigmas, _ = bounds.norm_estimates(network, variables[COLLECTION]["vectors"], 1)
    assert sigmas == {}  # all are nonexpansive by promise
    frozen = lipjax.freeze(model, variables)
    rows = {row.name: row for row in frozen.lipschitz_report()}
    assert rows["first/spatial/linear"].claimed == 1.0 == rows["second/pointwise/linear"].claimed
    images = np.random.default_rng(0).uniform(size=(3, 6, 6, 2))
    assert (frozen.certify(images).radii > 0).all()
    # Each output channel depends on all 2 x 2 x 2 inputs that meet: 8 channels, 2 times 4 groups.
    ops = [op for name, op in zip(frozen.network.names, frozen.network.ops, strict=True) if name.startswith("first")]

    def channels(x):
        for op in ops[:-1]:
            x = jax.tree.map(jnp.asarray, op)(x)
        return x[0, 1, 1]

    reached = np.abs(jax.jit(jax.jacobian(channels))(jnp.asarray(images[:1])))[:, 0].reshape(8, 3, 2, 3, 2, 2)
    assert (reached.max(axis=(1, 3)) > 1e-9).all()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (functools.partial(SOC, 8, groups=3), "groups >= 1 that divide its 8 channels"),
        (functools.partial(SOC, 8, groups=0), "got 0"),
        (
            functools.partial(SOC, 8, groups=2, padding="CIRCULAR", eval_terms=None),
            "2 groups, form 'auto' and num_terms",
        ),
        (functools.partial(SOC, 8, groups=2, padding="CIRCULAR", form="response"), "form 'spatial'"),
        (functools.partial(GroupAndShuffle, 8, groups=2, pointwise_groups=3), "that divide the 8 channels, got 3"),
        (functools.partial(GroupAndShuffle, 8, groups=3, pointwise_groups=2), "groups >= 1 that divide its 8 channels"),
    ],
)
def test_misuse_says_what_was_expected(layer, message):
    with pytest.raises(ValueError, match=message):
        layer(activation=None).init(jax.random.key(0), (4, 4, 2))
