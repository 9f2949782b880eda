"""Explicit orthogonal kernels (AOC, BCOP, SC-Fac's order, RKO, dense) against the original code, to 1e-9 in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_helpers import hwio, load, nhwc, relative
from tiers import everyday

from lipjax import conv
from lipjax.linalg import cholesky as choleskys
from lipjax.parametrize import aoc, bcop, bjorck

pytestmark = pytest.mark.quick_compiles

PARITY = 1e-9
AOC = ("up", "down", "odd_channels", "k5", "zeros", "s2_k4_expand", "rko_s2", "groups", "dilation")
AOC += ("transposed_s1", "transposed_s2", "transposed_rko")


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


@pytest.mark.parametrize("case", everyday(AOC, "groups"))
def test_adaptive_orthogonal_convolution_of_the_original(case):
    """Transposed layers have the kernel of the convolution whose adjoint they are."""
    z, c = golden(f"aoc_{case}")
    k, s, groups, dilation = c["kernel_size"], c["stride"], c["groups"], c["dilation"]
    transposed = case.startswith("transposed")
    sizes = (c["out_channels"], c["in_channels"], k, s) if transposed else (c["in_channels"], c["out_channels"], k, s)
    prefix = "param/parametrizations."
    names = {"weight": "patch" if k == s else "columns", "weight_1": "columns", "weight_2": "patch"}
    raw, gradients, states = {}, {}, {"param": {}, "output/after": {}}

    def of_groups(array):
        """A single group has no axis of groups here."""
        return jnp.asarray(array) if groups > 1 else jnp.asarray(array)[0]

    for original, name in names.items():
        if f"{prefix}{original}.original" not in z:
            continue
        change = hwio if name == "patch" else of_groups
        raw[name] = change(z[f"{prefix}{original}.original"])
        gradients[name] = change(z[f"output/grad/parametrizations.{original}.original"])
        inner = ".pi" if name == "patch" else ""
        for place, found in states.items():
            path = f"{place}/parametrizations.{original}.0{inner}.parametrizations."
            if f"{path}u.original" in z:  # single columns have none
                found[name] = {n: of_groups(z[f"{path}{n}.original"][..., 0]) for n in "uv"}
    assert groups == 1 or "patch" not in raw

    def made(raw):
        vectors = aoc.advance(raw, states["param"], 3)
        return aoc.kernel(raw, vectors, *sizes, groups=groups, dilation=dilation), vectors

    kernel, advanced = jax.jit(made)(raw)
    assert relative(kernel, hwio(z["output/kernel"])) < PARITY
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=PARITY), advanced, states["output/after"])
    before = jax.tree.leaves(states["param"])[0]
    assert relative(before, jax.tree.leaves(advanced)[0]) > 1e-3  # control: the state moves
    padding = "ZERO" if c["padding_mode"] == "zeros" else "CIRCULAR"
    if transposed:
        padding = ((c["padding"],) * 2,) * 2
    options = {"strides": s, "padding": padding, "groups": groups, "dilation": dilation}
    if transposed:
        size = z["output/y"].shape[2:]
        compare(lambda x, raw: conv.conv2d_adjoint(x, made(raw)[0], in_size=size, **options), z, raw, gradients)
        return
    compare(lambda x, raw: conv.conv2d(x, made(raw)[0], **options), z, raw, gradients)
    if groups > 1:  # control: groups in another order
        other = conv.conv2d(nhwc(z["input/x"]), jnp.roll(kernel, c["out_channels"] // groups, 3), **options)
        assert relative(other + z["param/bias"], nhwc(z["output/y"])) > 0.1


@pytest.mark.parametrize("case", everyday(["down", "7_steps", "s2"], "s2"))
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


@pytest.mark.parametrize("case", everyday(["up", "k4_s2", "k5_groups", "dilation"], "up"))
def test_separable_factors_of_the_original(case):
    """From orthogonal matrices on: how they are made differs (a method of `bjorck`; there an exponential)."""
    z, c = golden(f"scfac_{case}")
    taps, groups = range(1, c["kernel_size"] // c["stride"]), c["groups"]

    def stacked(prefix, suffix="", g=0):
        of_columns = [f"g{g}_d{axis}_{side}{j}" for axis in range(2) for j in taps for side in "rl"]
        of_columns = [name for name in of_columns if f"param/{name}.matrix" in z]
        names = {"squares": [f"g{g}_d0", f"g{g}_d1"], "columns": of_columns}
        return {n: jnp.stack([jnp.asarray(z[f"{prefix}{m}{suffix}"]) for m in of]) for n, of in names.items()}

    def of_all(*where):
        found = [stacked(*where, g=g) for g in range(groups)]
        return {name: jnp.stack([of_group[name] for of_group in found]) for name in found[0]}

    params = of_all("param/", ".matrix")
    sizes = c["in_channels"] // groups, c["out_channels"] // groups, c["stride"]

    def made(params):
        parts = [aoc.separable(params["squares"][g], params["columns"][g], *sizes) for g in range(groups)]
        return jnp.concatenate(parts, -1)

    assert relative(jax.jit(made)(params), hwio(z["output/kernel"])) < PARITY
    options = {"strides": c["stride"], "padding": "CIRCULAR", "groups": groups, "dilation": c["dilation"]}
    compare(lambda x, p: conv.conv2d(x, made(p), **options), z, params, of_all("output/grad/"))


@pytest.mark.parametrize(
    "case", everyday(["default_up", "exp_down", "qr_up", "cholesky_down"], "default_up", "cholesky_down")
)
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
