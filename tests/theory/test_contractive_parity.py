"""SLL, CPL and sandwich layers against the papers' own code: outputs, effective arrays and every gradient."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipjax import operators
from lipjax.parametrize import cpl, sandwich, sll

pytestmark = pytest.mark.quick_compiles

GOLDEN = Path(__file__).parents[1] / "golden"
# Of each method a dense layer and a convolution are compared in every run.
ALWAYS = {
    "sll_dense_wide",
    "sll_conv_q",
    "cpl_dense_wide",
    "cpl_compared_conv",
    "sandwich_fc_up",
    "sandwich_conv_s2",
}


def cases(prefix):
    names = sorted(path.stem for path in GOLDEN.glob(f"{prefix}_*.npz"))
    assert ALWAYS & set(names)
    return [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.nightly) for name in names]


class Case:
    """A golden file with arrays in the layouts of lipjax."""

    def __init__(self, name):
        stored = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
        self.meta = json.loads(str(stored["meta"]))
        self.name, self.arrays = name, {key: stored[key] for key in stored.files if key != "meta"}

    def __getitem__(self, key):
        value = self.arrays[key]
        if value.ndim == 4 and (key.startswith("param/") or "/grad/" in key or "/grad_train" in key):
            if key.endswith(("kernel", "weight")):
                return jnp.asarray(value.transpose(2, 3, 1, 0))
            if key.endswith("bias"):
                return jnp.asarray(value.ravel())
        if value.ndim == 4:
            return jnp.asarray(value.transpose(0, 2, 3, 1))
        return jnp.asarray(value.ravel() if key.endswith("bias") else value)

    def params(self, *names):
        return {name: self[f"param/{name}"] for name in names}


def close(ours, theirs, what):
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape, what
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-9 * max(np.abs(theirs).max(), 1e-300), what


def _with_gradients(layer, params, x, cotangent):
    found, back = jax.vjp(lambda p, x: layer(p, x), params, x)
    return found, back(cotangent)


def compare(case, layer, params, y="output/y", grad="output/grad"):
    """layer: (params, x) -> y. Compares y and the gradients of sum(y * cotangent)."""
    run = jax.jit(functools.partial(_with_gradients, layer))
    found, (of_params, of_x) = run(params, case["input/x"], case["input/cotangent"])
    close(found, case[y], "y")
    for name, gradient in of_params.items():
        close(gradient, case[f"{grad}/{name}"], name)
    grad_x = grad.replace("output/grad", "output/grad_x").replace("_exact", "")
    close(of_x, case[grad_x], "x")


def linear_of(weight, x):
    return operators.Dense(weight) if weight.ndim == 2 else operators.Conv(weight, x.shape[1:])


def step(weight, bias, x):
    linear = linear_of(weight, x)
    return operators.PotentialStep(linear, bias, operators.ReLU(linear.out_shape))(x)


def sll_layer(weight, bias, theta, x, **options):
    made, scale = (sll.dense if weight.ndim == 2 else sll.conv)(weight, theta, room=1.0, **options)
    return step(made, scale * bias, x)


apply = jax.jit(lambda op, x: op(x))


def norm_of(operator):
    eye = np.eye(int(np.prod(operator.in_shape))).reshape(-1, *operator.in_shape)
    return np.linalg.norm(np.asarray(apply(operator, jnp.asarray(eye))).reshape(len(eye), -1), 2)


@pytest.mark.parametrize("name", cases("sll"))
def test_sll(name):
    case = Case(name)
    if "dense" in name:
        compare(case, lambda p, x: sll_layer(p["weight"], p["bias"], p["q"], x), case.params("weight", "bias", "q"))
        scales = sll.dense(case["param/weight"], case["param/q"], room=1.0)[1]
        close(scales**2, case["output/t"], "t")
        assert norm_of(operators.Dense(sll.dense(case["param/weight"], case["param/q"])[0])) < 1
        return
    weight, q = case["param/kernel"], case["param/q"]
    if "_q" in name:

        def layer(p, x):
            theta = jnp.log(jnp.abs(p["q"]) + 1e-6)
            return sll_layer(p["kernel"], p["bias"], theta, x, epsilon=1e-6)

        compare(case, layer, case.params("kernel", "bias", "q"))
        close(2 * sll.conv(weight, jnp.log(jnp.abs(q) + 1e-6), epsilon=1e-6, room=1.0)[1] ** 2,
              case["output/rescaling"], "2 t")  # fmt: skip
        if "k5" in name:
            return
        # LBDN's has no epsilon.
        close(sll_layer(weight, case["param/bias"], jnp.log(jnp.abs(q)), case["input/x"]), case["output/y_lbdn"], "y")
    else:  # q has no effect there, whatever it is: it is broadcast along the axis along which it is divided out
        compare(case, lambda p, x: sll_layer(p["kernel"], p["bias"], 0 * q, x), case.params("kernel", "bias"))
        assert np.abs(case["output/grad/q"]).max() < 1e-14 and np.ptp(q) > 0.1
        ours = sll_layer(weight, case["param/bias"], q, case["input/x"])
        assert np.abs(ours - case["output/y"]).max() > 1e-3  # control: ours has one
    x = case["input/x"]
    made, _ = sll.conv(weight, 0 * q, room=1.0)
    if "_q" not in name:
        close(jnp.asarray(norm_of(linear_of(made, x)) ** 2), case["output/mu"], "mu")
    for theta in (0 * q, q, 20 * q):  # also where e^theta and e^-theta would leave float32
        assert norm_of(linear_of(sll.conv(weight, theta)[0], x)) < 1


def original_sigma(operator, u, moving):
    """The papers' estimate after one step from u: <v, A u'>, u' the next vector; v moves with A or is a constant."""
    added = 0.0 if moving else 1e-6  # to lengths that are divided by
    v = operator(u)
    v = v / (jnp.linalg.norm(v) + added)
    after = operator.adjoint(v)
    after = jax.lax.stop_gradient(after / (jnp.linalg.norm(after) + added))
    v = v if moving else jax.lax.stop_gradient(v)
    return jnp.sum(v * operator(after)), after


@pytest.mark.parametrize("name", cases("cpl"))
def test_cpl(name):
    case = Case(name)
    compared = "compared" in name
    weight, epsilon = ("weights" if "dense" in name else "kernel"), 1e-6 if compared else 1e-4
    start = case["param/u" if compared else "param/pm.u"]

    def train(p, x):
        sigma, _ = original_sigma(linear_of(p[weight], x), start, moving=not compared)
        made, factor = cpl.contracted(p[weight], sigma, epsilon=epsilon, room=1.0)
        return step(made, factor * p["bias"], x)

    params, x = case.params(weight, "bias"), case["input/x"]
    if "dense" in name:  # theirs is not the gradient of what they compute: their vector is replaced before backward
        exact = {"weights": case["output/grad_train_exact/weights"], "bias": case["output/grad_train/bias"]}
        found, (gradients, of_x) = jax.jit(functools.partial(_with_gradients, train))(
            params, x, case["input/cotangent"]
        )
        close(found, case["output/y_train"], "y")
        for key, gradient in gradients.items():
            close(gradient, exact[key], key)
        close(of_x, case["output/grad_x_train"], "x")
        theirs = case["output/grad_train/weights"]
        assert 0.01 < np.linalg.norm(gradients["weights"] - theirs) / np.linalg.norm(theirs) < 0.3
    else:
        compare(case, train, params, "output/y_train", "output/grad_train")
    operator = linear_of(params[weight], x)
    sigma, u = original_sigma(operator, start, moving=not compared)
    close(u, case["output/u_train"], "u")
    # Ours ends on |A u'|, half a step further; both are below the norm, and ours converges to it.
    ours, after = operator.estimate(start.reshape(operator.in_shape), 1)
    assert np.abs(after.reshape(u.shape) - u).max() < 1e-6
    exact = float(case["output/sigma_exact"])
    assert sigma < ours <= exact * (1 + 1e-12)
    assert cpl.converged(operator, after) == pytest.approx(exact * cpl.MARGIN, rel=1e-4)
    # What their evaluation makes of 100 steps is bounded as it is, with the constant that it has.
    if compared:
        rescaling = case["output/rescaling_eval"]
        factor = jnp.sqrt(rescaling / 2)
        y = step(factor * params[weight], factor * params["bias"], x)
    else:
        made, factor = cpl.contracted(params[weight], case["output/sigma_100"], epsilon=epsilon, room=1.0)
        y = step(made, factor * params["bias"], x)
    close(y, case["output/y_eval"], "y_eval")
    evaluated = linear_of(np.asarray(factor * params[weight]), x)
    constant = operators.PotentialStep(
        evaluated, np.zeros(evaluated.out_shape[-1]), operators.ReLU(evaluated.out_shape)
    )
    true = max(1.0, 2 * (float(factor) * exact) ** 2 - 1)
    assert true * (1 - 1e-12) <= constant.bound().proved <= true + 1e-8


def sandwich_layer(case, p, x, blocks=None):
    """The paper's layer, of stacked maps with outputs = hidden channels."""
    gain, hidden = case.meta["constructor"].get("scale", 1.0), p["bias"].shape[0]
    options = {"outputs": hidden, "gain": gain, "room": 1.0}
    if p["weight"].ndim == 2:
        linear = operators.Dense(sandwich.dense(p["weight"], p["alpha"], **options))
    else:
        stacked = sandwich.blocks(p["weight"], p["alpha"], x.shape[1:3], **options)
        linear = operators.CircularConv.from_blocks(*stacked, (*x.shape[1:3], p["weight"].shape[2]))
    bias = sandwich.bias(p["bias"], p["psi"], gain=gain, room=1.0)
    return operators.Sandwich(linear, bias, operators.ReLU(linear.out_shape), hidden)


def linear_layer(case, p, x):
    """Their layers without an activation: B x + b, and 2 A^T B x + b."""
    gain, hidden = case.meta["constructor"].get("scale", 1.0), p["bias"].shape[0]
    if p["weight"].ndim == 2:
        linear = operators.Dense(sandwich.dense(p["weight"], p["alpha"], outputs=hidden, room=1.0))
    else:
        stacked = sandwich.blocks(p["weight"], p["alpha"], x.shape[1:3], outputs=hidden, room=1.0)
        linear = operators.CircularConv.from_blocks(*stacked, (*x.shape[1:3], p["weight"].shape[2]))
    y = linear.channels(hidden, None)(gain * x)
    if "conv" in case.name or case.meta["constructor"].get("AB"):
        y = linear.channels(0, hidden).transpose(2.0)(y)
    return y + p["bias"]


@pytest.mark.parametrize("name", cases("sandwich"))
def test_sandwich(name):
    case = Case(name)
    stride = case.meta["constructor"].get("stride", 1)

    def layer(p, x):
        x = operators.SpaceToDepth(x.shape[1:], stride)(x) if stride > 1 else x
        return linear_layer(case, p, x) if "lin" in name else sandwich_layer(case, p, x)(x)

    params = case.params("weight", "bias", "alpha", *(() if "lin" in name else ("psi",)))
    compare(case, layer, params)
    if "lin" in name:
        return
    x = case["input/x"]
    x = operators.SpaceToDepth(x.shape[1:], stride)(x) if stride > 1 else x
    gain, made = case.meta["constructor"].get("scale", 1.0), sandwich_layer(case, params, x)
    constant = jax.tree.map(np.asarray, made).bound().proved
    assert gain * (1 - 1e-12) <= constant <= gain * (1 + 1e-8)  # rows are orthonormal, so [A B] has norm 1
    if "fc" in name:
        close(made.linear.matrix / gain**0.5, case["output/Q"], "Q")


def test_odd_maps_keep_their_columns():
    """The original's inverse transform has no size, and gives 5 x 4 for 5 x 5."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 5, 2)))
    stacked = sandwich.blocks(kernel, jnp.asarray(2.0), (5, 5), outputs=2)
    linear = operators.CircularConv.from_blocks(*stacked, (5, 5, 5))
    op = operators.Sandwich(linear, jnp.zeros(2), operators.ReLU((5, 5, 2)), 2)
    assert op(jnp.ones((1, 5, 5, 3))).shape == (1, 5, 5, 2)
    assert 1 - 1e-6 < jax.tree.map(np.asarray, op).bound().proved <= 1
