"""Explicit orthogonal kernels (AOC, BCOP, SC-Fac's order, RKO, dense) against the original code, to 1e-9 in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_helpers import hwio, load, nhwc, relative

from lipjax import conv
from lipjax.linalg import cholesky as choleskys
from lipjax.parametrize import aoc, bcop, bjorck

PARITY = 1e-9
AOC = ("up", "down", "odd_channels", "k5", "zeros", "s2_k4_expand", "rko_s2", "groups")


def golden(name):
    """The arrays of a golden file, and the arguments of the original's constructor."""
    arrays, meta = load(name)
    return arrays, meta["constructor"]


def compare(layer, z, params, expected, *, images=True):
    """Output and all gradients. layer: (x, params) -> y without bias; expected: like params, the golden gradients."""
    change = nhwc if images else jnp.asarray
    x, cotangent = change(z["input/x"]), change(z["input/cotangent"])

    @jax.jit
    def run(x, params, cotangent):
        y, pull = jax.vjp(layer, x, params)
        return y, pull(cotangent)

    y, (grad_x, grads) = run(x, params, cotangent)
    bias = z["param/bias"] if "param/bias" in z else 0.0
    assert relative(y + bias, change(z["output/y"])) < PARITY
    assert relative(grad_x, change(z["output/grad_x"])) < PARITY
    assert expected.keys() == params.keys()
    for name, gradient in expected.items():
        assert relative(grads[name], gradient) < PARITY


@pytest.mark.parametrize("case", AOC)
def test_adaptive_orthogonal_convolution_of_the_original(case):
    z, c = golden(f"aoc_{case}")
    k, s, groups = c["kernel_size"], c["stride"], c["groups"]
    ci, co = c["in_channels"] // groups, c["out_channels"] // groups
    prefix = "param/parametrizations."
    names = {"weight": "patch" if k == s else "columns", "weight_1": "columns", "weight_2": "patch"}
    raw, gradients, states = {}, {}, {"param": {}, "output/after": {}}
    for original, name in names.items():
        if f"{prefix}{original}.original" not in z:
            continue
        change = (lambda a: hwio(a)[None]) if name == "patch" else jnp.asarray
        raw[name] = change(z[f"{prefix}{original}.original"])
        gradients[name] = change(z[f"output/grad/parametrizations.{original}.original"])
        inner = ".pi" if name == "patch" else ""
        for place, found in states.items():
            path = f"{place}/parametrizations.{original}.0{inner}.parametrizations."
            found[name] = {n: jnp.asarray(z[f"{path}{n}.original"][..., 0]) for n in "uv"}

    def made(raw):
        """The kernel of all groups side by side, and the vectors of each."""
        kernels, vectors = [], []
        for g in range(groups):
            of_group, start = jax.tree.map(lambda a, g=g: a[g], (raw, states["param"]))
            vectors.append(aoc.advance(of_group, start, 3))
            kernels.append(aoc.kernel(of_group, vectors[-1], ci, co, k, s))
        return jnp.concatenate(kernels, -1), jax.tree.map(lambda *v: jnp.stack(v), *vectors)

    kernel, advanced = jax.jit(made)(raw)
    assert relative(kernel, hwio(z["output/kernel"])) < PARITY
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=PARITY), advanced, states["output/after"])
    before = jax.tree.leaves(states["param"])[0]
    assert relative(before, jax.tree.leaves(advanced)[0]) > 1e-3  # control: the state moves

    def layer(x, raw):
        kernel, _ = made(raw)
        options = {"strides": s, "padding": "ZERO" if c["padding_mode"] == "zeros" else "CIRCULAR"}
        split = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
        return jnp.concatenate([conv.conv2d(part, of_group, **options) for part, of_group in split], -1)

    compare(layer, z, raw, gradients)


@pytest.mark.parametrize("case", ["down", "7_steps", "s2"])
def test_block_convolution_of_the_original(case):
    """s2: an even kernel, which the original puts one pixel further. 7_steps: far from converged."""
    z, c = golden(f"bcop_{case}")
    s, (ci, co) = c["stride"], (c["in_channels"] * c["stride"] ** 2, c["out_channels"])
    raw, u = jnp.asarray(z["param/param_matrices"]), jnp.asarray(z["input/power_u"][..., 0])

    def made(raw):
        vectors = bjorck.advance(raw, {"u": u, "v": jnp.zeros(u.shape)}, 10, bjorck.LCONVNET)
        return bcop.kernel(raw, vectors, ci, co, num_iters=c["bjorck_iters"])

    kernel = jax.jit(made)(raw)
    assert relative(kernel, hwio(z["output/kernel"])) < PARITY
    even = kernel.shape[0] % 2 == 0
    assert even == (case == "s2")

    def layer(x, params):
        y = conv.conv2d(conv.space_to_depth(x, s), made(params["raw"]), padding="CIRCULAR")
        return jnp.roll(y, (1, 1), (1, 2)) if even else y

    compare(layer, z, {"raw": raw}, {"raw": z["output/grad/param_matrices"]})


@pytest.mark.parametrize("case", ["up", "k4_s2"])
def test_separable_factors_of_the_original(case):
    """From orthogonal matrices on: how they are made differs (a method of `bjorck`; there an exponential)."""
    z, c = golden(f"scfac_{case}")
    taps = range(1, c["kernel_size"] // c["stride"])
    of_columns = [f"g0_d{axis}_{side}{j}" for axis in range(2) for j in taps for side in "rl"]
    of_columns = [name for name in of_columns if f"param/{name}.matrix" in z]
    names = {"squares": ["g0_d0", "g0_d1"], "columns": of_columns}

    def stacked(prefix, suffix=""):
        return {n: jnp.stack([jnp.asarray(z[f"{prefix}{m}{suffix}"]) for m in of]) for n, of in names.items()}

    params = stacked("param/", ".matrix")
    sizes = c["in_channels"], c["out_channels"], c["stride"]
    made = jax.jit(lambda p: aoc.separable(p["squares"], p["columns"], *sizes))
    assert relative(made(params), hwio(z["output/kernel"])) < PARITY
    options = {"strides": c["stride"], "padding": "CIRCULAR"}
    compare(lambda x, p: conv.conv2d(x, made(p), **options), z, params, stacked("output/grad/"))


@pytest.mark.parametrize("case", ["default_up", "exp_down", "qr_up", "cholesky_down"])
def test_dense_matrix_of_the_original(case):
    """exp: the original cuts the series after the power 11, off by at most 1 / 12!. qr: the scale has no effect."""
    z, c = golden(f"ortho_linear_{case}")
    prefix = "parametrizations.weight"
    raw = jnp.asarray(z[f"param/{prefix}.original"])
    method = "bjorck" if c["ortho_params"] == "default" else c["ortho_params"]
    # The original's shift is 1e-5 whatever the scale of the matrix; ours is relative to it.
    ridge = 1e-5 / float(jnp.mean(jnp.sum(raw**2, 1)))

    def made(raw):
        if method == "cholesky":
            return choleskys.orthogonalize(raw, ridge, "products")
        if not bjorck.needs_vectors(method):
            return bjorck.orthogonalize(raw, {}, method)
        vectors = {n: jnp.asarray(z[f"param/{prefix}.0.parametrizations.{n}.original"][:, 0]) for n in "uv"}
        return bjorck.orthogonalize(raw, bjorck.advance(raw, vectors, 3), method)

    assert relative(jax.jit(made)(raw), z["output/W"]) < PARITY
    gradient = {"raw": z[f"output/grad/{prefix}.original"]}
    compare(lambda x, p: jnp.matmul(x, jnp.transpose(made(p["raw"]))), z, {"raw": raw}, gradient, images=False)


def test_three_steps_of_the_original():
    z, c = golden("bjorck_linear_3_steps")
    raw, u = jnp.asarray(z["param/weight"]), jnp.asarray(z["input/power_u"][:, 0])

    def made(raw):
        vectors = bjorck.advance(raw, {"u": u, "v": jnp.zeros(raw.shape[1])}, 10, bjorck.LCONVNET)
        return bjorck.iterate(bjorck.scaled(raw, vectors, bjorck.LCONVNET), c["bjorck_iters"])

    assert relative(made(raw), z["output/W"]) < PARITY
    values = np.linalg.svd(made(raw), compute_uv=False)
    assert values[0] <= 1 + 1e-14 and values[-1] < 0.2  # not converged, and sound
    gradient = {"raw": z["output/grad/weight"]}
    compare(lambda x, p: x @ made(p["raw"]).T, z, {"raw": raw}, gradient, images=False)


def test_the_gradient_is_that_of_all_steps():
    """deel-torchlip detaches the cubic term from the fifth step on, which is no gradient of anything; ours is exact."""
    z, _ = golden("tl_bjorck_tall")
    scaled, steps = jnp.asarray(z["output/w_spectral"]), int(z["output/steps"])
    assert steps > 5
    made, pull = jax.vjp(jax.jit(functools.partial(bjorck.iterate, num_iters=steps)), scaled)
    (gradient,) = pull(jnp.asarray(z["input/cotangent"]))
    assert relative(made, z["output/w_bjorck"]) < PARITY
    assert relative(gradient, z["output/grad_w_exact"]) < PARITY
    assert relative(gradient, z["output/grad_w"]) > 0.1  # the original's
