"""N-activation, partial absolute value, linear splines: parity, slopes, rounding errors, hostile numbers, tampering."""

import itertools
import math
import pathlib
import re
import shutil
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checker_helpers import Forger, draw, linear_head, write_run
from tiers import everyday

from lipjax import NotCertifiable, activations, checker, operators
from lipjax.network import make_network
from lipjax.numerics import UNDERFLOW_OF_OPERATOR

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
PARITY = 1e-9
U = Fraction(1, 2**53)


def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file if key != "meta"}


def last(a):
    """Channels last."""
    return jnp.asarray(np.moveaxis(a, 1, -1))


def relative(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


# ---- parity --------------------------------------------------------------------------------------------------------


@pytest.mark.quick_compiles
@pytest.mark.parametrize(("name", "rate"), [("act_n_dense", 1.0), ("act_n_conv", 4.0)])
def test_parity_of_the_n_activation(name, rate):
    z = load(name)
    x, theta, smooth = last(z["input/x"]), jnp.asarray(z["param/theta"]), last(z["input/smooth_mask"]) == 1
    y, pull = jax.vjp(lambda x, t: activations.n_activation(x, *activations.n_thresholds(t, rate)), x, theta)
    assert relative(np.stack(activations.n_thresholds(theta, rate), 1), z["output/theta_sorted"]) < PARITY
    assert relative(y, last(z["output/y"])) < PARITY
    grad_x, grad_theta = pull(last(z["input/cotangent"]))
    assert relative(jnp.where(smooth, grad_x, 0), jnp.where(smooth, last(z["output/grad_x"]), 0)) < PARITY
    # At breaks the right-hand piece, as there; rows 0 to 2 of theta have planted ties and equal thresholds.
    assert relative(grad_x, last(z["output/grad_x"])) < PARITY
    assert relative(grad_theta[3:], z["output/grad/theta"][3:]) < PARITY
    control = activations.n_activation(x, *activations.n_thresholds(theta, 1.01 * rate))
    assert relative(control, last(z["output/y"])) > 1e-4


@pytest.mark.quick_compiles
@pytest.mark.parametrize("name", everyday(["act_spline_fc", "act_spline_conv"], "act_spline_conv"))
def test_parity_of_the_spline(name):
    z = load(name)
    channels, knots = z["output/coefficients"].shape
    spacing = float(z["output/grid"])
    smooth = last(z["input/smooth_mask"]) == 1

    def layer(x, raw, scale):
        values = activations.spline_values(raw.reshape(channels, knots), spacing)
        return activations.linear_spline(x, values, spacing, scale.reshape(-1))

    raw = jnp.asarray(z["param/coefficients_vect"])
    y, pull = jax.vjp(layer, last(z["input/x"]), raw, jnp.asarray(z["param/scaling_coeffs_vect"]))
    values = activations.spline_values(raw.reshape(channels, knots), spacing)
    assert relative(values, z["output/coefficients"]) < PARITY
    assert relative(y, last(z["output/y"])) < PARITY
    grads = pull(last(z["input/cotangent"]))
    assert bool(smooth.all())
    assert relative(grads[0], last(z["output/grad_x"])) < PARITY
    assert relative(grads[1], z["output/grad/coefficients_vect"]) < PARITY
    assert relative(grads[2], z["output/grad/scaling_coeffs_vect"]) < PARITY


def test_differences_at_the_ends_of_the_interval_pass_the_whole_gradient():
    """Where splines start: `jnp.clip` passes half of it."""
    raw, weights = jnp.array([[2.0, 1.0, 0.0, 1.0, 2.0]]), jnp.array([[1.0, 2.0, 4.0, 8.0, 16.0]])
    gradient = jax.grad(lambda raw: jnp.sum(weights * activations.spline_values(raw, 1.0)))(raw)
    np.testing.assert_allclose(gradient, weights, rtol=1e-14)  # nothing is clipped: the identity
    steeper = jax.grad(lambda raw: jnp.sum(weights * activations.spline_values(raw, 0.5)))(raw)
    np.testing.assert_allclose(steeper, jnp.full((1, 5), 31 / 5), rtol=1e-14)  # control: only the mean is left


# ---- what they are, in exact arithmetic ----------------------------------------------------------------------------


def exact_spline(values, scale, spacing, x):
    t = Fraction(float(scale)) * x
    middle = len(values) // 2
    first = min(max(math.floor(t / spacing), -middle), middle - 1)
    left, right = (Fraction(float(v)) for v in values[first + middle : first + middle + 2])
    return (left + (t / spacing - first) * (right - left)) / Fraction(float(scale))


def exact(op, channel, x):
    x = Fraction(float(x))
    if isinstance(op, operators.PartialAbs):
        return abs(x) if channel < op.channels else x
    if isinstance(op, operators.NActivation):
        low, high = (Fraction(float(a[channel])) for a in (op.lower, op.upper))
        return max(x - 2 * high, min(x - 2 * low, -x))
    return exact_spline(op.values[channel], op.scale[channel], Fraction(op.spacing), x)


def hostile_splines():
    """Steep, flat, kinked, huge, tiny; slopes within an ulp of 1; negative and extreme scales."""
    rng = np.random.default_rng(0)
    spacing, knots = 0.25, 7
    ramps = spacing * (np.arange(knots) - 3.0)
    rows = [ramps, np.abs(ramps), np.maximum(ramps, 0), rng.normal(size=knots), 1e8 + ramps, 1e-12 * rng.normal(size=7)]
    rows += [
        np.nextafter(ramps, 9),
        np.asarray(activations.spline_values(jnp.asarray(rng.normal(size=(1, 7))), 0.25))[0],
    ]
    scale = np.array([1.0, -0.7, 3.0, 1.3, 1e-3, 1e3, 1.0, 0.3])
    return operators.LinearSpline(np.stack(rows), scale, (8,), spacing)


def hostile_n_activation():
    lower = np.array([-1.0, 0.0, 0.3, 2.0, -1e8, 1e-300, 0.1, -0.1])
    upper = np.array([0.0, 0.0, -0.3, 2.0 + 2.0**-51, 1e8, 1.0, 0.1, 0.7])  # unsorted and equal ones, too
    return operators.NActivation(lower, upper, (8,))


OPS = {
    "spline": hostile_splines(),
    "n": hostile_n_activation(),
    "partial": operators.PartialAbs((8,), 0.375),
}
POINTS = [0.0, 0.25, -0.25, 0.75, -0.75, 1.0, 0.1, -0.3, 7.5, -1e3, 1e8, -1e-8, 2.0, 0.3, -0.1, 0.7, 1e-300]


def images(op):
    """Points, and those beside knots and breaks, for every channel."""
    rng = np.random.default_rng(1)
    points = np.concatenate([POINTS, np.nextafter(POINTS, 9), np.nextafter(POINTS, -9), 3 * rng.normal(size=60)])
    return np.repeat(points[:, None], op.in_shape[-1], 1)


@pytest.mark.parametrize("name", OPS)
def test_rounding_errors_and_constants_against_exact_rationals(name):
    op, x = OPS[name], images(OPS[name])
    y, claimed = jax.jit(lambda op, x: (op(x), op.rounding_error(x)))(op, jnp.asarray(x))
    counterpart = as_checked(op)
    theirs, local = counterpart.evaluate(x)
    constant, ratios = Fraction(op.bound().proved), []
    truths = [[exact(op, c, v) for c, v in enumerate(row)] for row in x]
    for row, truth, *found in zip(x, truths, np.asarray(y), np.asarray(claimed), theirs, local, strict=True):
        floor = UNDERFLOW_OF_OPERATOR * (1 + float(np.linalg.norm(row)))
        for values, allowed in ((found[0], found[1]), (found[2], found[3])):
            error = sum((Fraction(float(v)) - t) ** 2 for v, t in zip(values, truth, strict=True))
            assert error <= (Fraction(float(allowed)) + Fraction(floor)) ** 2
        error = max(abs(Fraction(float(v)) - t) for v, t in zip(found[0], truth, strict=True))
        ratios.append(float(error / (Fraction(float(found[1])) + Fraction(floor))))
    assert max(ratios) > 1e-3 or name == "partial"  # control: they do round
    for channel in range(op.in_shape[-1]):
        for i, j in itertools.pairwise(np.argsort(x[:, channel], kind="stable")):
            gap = abs(Fraction(float(x[i, channel])) - Fraction(float(x[j, channel])))
            assert abs(truths[i][channel] - truths[j][channel]) <= constant * gap
    low, high = op.slope
    assert max(-low, high) >= constant and counterpart.slope[0] >= low and counterpart.slope[1] <= high
    assert counterpart.proves(Fraction(op.bound().claimed), "", {})
    assert not counterpart.proves(max(map(abs, counterpart.slope)) - Fraction(1, 2**80), "", {})


def as_checked(op):
    fields = {"in_shape": list(op.in_shape)}
    for field in ("lower", "upper", "values", "scale", "spacing", "fraction"):
        if hasattr(op, field):
            fields[field] = getattr(op, field)
    return checker.OPERATORS[type(op).__name__](fields)


def test_slopes_of_splines_are_exact():
    """Slopes of 1 + 2^-52 and of 1 are told apart, in float64 and where differences round."""
    values = np.array([[-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0 + 2.0**-52], [1e16, 0.0, -1.0]])
    ones = np.ones(3)
    assert operators.LinearSpline(values[:1], ones[:1], (1,), 1.0).bound().proved == 1.0
    assert operators.LinearSpline(values[:2], ones[:2], (2,), 1.0).slope == (1.0, 1.0 + 2.0**-52)
    op = operators.LinearSpline(np.array([[0.1, 0.4, 0.0]]), ones[:1], (1,), 0.25)
    least, steepest = -Fraction(0.4) * 4, (Fraction(0.4) - Fraction(0.1)) * 4
    assert Fraction(op.slope[0]) <= least and Fraction(op.slope[1]) >= steepest
    assert as_checked(op).slope == (least, steepest)
    assert op.bound().method == "exact: slopes of the stored values" and op.bound().claimed == op.bound().proved
    # Where the constructor looked, but arrays changed.
    for field, value in (("values", np.full((1, 3), np.nan)), ("scale", np.zeros(1)), ("values", np.ones((1, 4)))):
        object.__setattr__(op, field, value)
        with pytest.raises(NotCertifiable, match="LinearSpline|odd number"):
            op.bound()
        object.__setattr__(op, field, np.ones((1, 3)) if field == "values" else np.ones(1))
    with pytest.raises(NotCertifiable, match="not finite"):
        operators.NActivation(np.array([np.inf]), np.zeros(1), (1,)).bound()


def test_partial_absolute_values():
    op = operators.PartialAbs((4, 4, 8), 0.25)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 8)))
    np.testing.assert_array_equal(op(x), np.concatenate([np.abs(x[..., :2]), x[..., 2:]], -1))
    assert operators.PartialAbs((3,), 0.0).slope == (1.0, 1.0) and operators.PartialAbs((3,), 1.0).slope == (-1.0, 1.0)
    gradient = jax.grad(lambda x: operators.PartialAbs((2,), 0.5)(x[None]).sum())(jnp.array([0.0, 0.0]))
    assert gradient.tolist() == [1.0, 1.0]
    # MaxMin is it in other coordinates.
    pair = np.array([[1.0, -1.0], [1.0, 1.0]]) / np.sqrt(2)
    z = np.random.default_rng(1).normal(size=(50, 2))
    turned = np.asarray(operators.PartialAbs((2,), 0.5)(jnp.asarray(z @ pair.T))) @ pair
    np.testing.assert_allclose(turned, np.stack([z.max(1), z.min(1)], 1), atol=1e-15)


def test_nan_passes_and_gradients_are_finite_at_breaks():
    x = np.array([[np.nan] * 8, [0.0] * 8, [0.25] * 8, [-0.75] * 8, [1e300] * 8])
    for op in jax.tree.map(jnp.asarray, list(OPS.values())):
        y, pull = jax.vjp(lambda x, op=op: op(x), jnp.asarray(x))
        slopes = pull(jnp.ones_like(y))[0]
        assert np.isnan(y[0]).all() and np.isfinite(np.asarray(y)[1:-1]).all() and np.isfinite(slopes[1:-1]).all()
        assert float(jnp.abs(slopes[1:-1]).max()) <= op.bound().proved * (1 + 1e-12)


# ---- networks of them ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    rng = np.random.default_rng(0)
    shape = (4, 3, 4)
    values = np.asarray(activations.spline_values(jnp.asarray(rng.normal(size=(6, 9))), 0.5))
    ops = [
        ("conv", operators.Conv(draw(rng, 3, 3, 1, 4), (4, 3, 1))),
        ("n", operators.NActivation(-rng.random(4), rng.random(4), shape)),
        ("mixed", operators.Conv(draw(rng, 1, 1, 4, 4), shape)),
        ("partial", operators.PartialAbs(shape, 0.75)),
        ("flat", operators.Flatten(shape)),
        ("dense", operators.Dense(draw(rng, 6, 48))),
        ("spline", operators.LinearSpline(values, 1 + rng.random(6), (6,), 0.5)),
        ("out", operators.Dense(draw(rng, 5, 6))),
    ]
    network = make_network(ops, linear_head(rng, 3, 5), 0.3, 0.5)
    directory = tmp_path_factory.mktemp("channelwise") / "run"
    return directory, write_run(directory, network)


@pytest.mark.quick_compiles
def test_the_certificate_is_proved_and_comes_back(run):
    directory, frozen = run
    code, lines = checker.check(directory)
    assert code == 0, lines
    rows = {row.name: row for row in frozen.lipschitz_report()}
    assert rows["n"].claimed == rows["partial"].claimed == 1.0 and 0.9 < rows["spline"].claimed < 1 + 1e-12
    loaded = type(frozen).load(directory / "frozen")
    x = np.random.default_rng(3).uniform(size=(4, 4, 3, 1))
    np.testing.assert_array_equal(loaded.certify(x).radii, frozen.certify(x).radii)
    assert (frozen.certify(x).radii > 0).any()


def steeper_spline(f):
    f.arrays["ops/spline/values"] = f.arrays["ops/spline/values"] * 1.01


def lower_bound(f):
    f.layer("spline")["bound"] *= 1 - 1e-9


def narrower_knots(f):
    f.op("spline")["spacing"] = 0.25


def odd_spacing(f):
    f.op("spline")["spacing"] = 0.3


def even_knots(f):
    f.arrays["ops/spline/values"] = np.ascontiguousarray(f.arrays["ops/spline/values"][:, 1:])


def no_scale(f):
    f.arrays["ops/spline/scale"] = 0 * f.arrays["ops/spline/scale"]


def other_channels(f):
    f.op("partial")["fraction"] = 0.3


def beyond(f):
    f.op("partial")["fraction"] = 2.0


def other_modulus(f):
    f.op("partial")["fraction"] = 0.25


def one_threshold(f):
    f.arrays["ops/n/lower"] = f.arrays["ops/n/lower"][:1]


def infinite_threshold(f):
    f.arrays["ops/n/upper"] = np.full(4, 1e200)


def larger_thresholds(f):
    f.arrays["ops/n/upper"] = f.arrays["ops/n/upper"] + 0.5


def other_method(f):
    f.layer("spline")["method"] = "exact: slopes between -1 and 1"


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (steeper_spline, r"spline \(LinearSpline\): the bound .* cannot be proved"),
        (lower_bound, r"spline \(LinearSpline\): the bound .* cannot be proved"),
        (narrower_knots, r"spline \(LinearSpline\): the bound .* cannot be proved"),
        (odd_spacing, "spacing 0.3 is no power of two"),
        (even_knots, r"values \(6, 8\)"),
        (no_scale, "scales beyond"),
        (other_channels, "fraction 0.3 of 4 channels"),
        (beyond, "fraction 2.0 of 4 channels"),
        (other_modulus, "image"),
        (one_threshold, r"thresholds \(1,\)"),
        (infinite_threshold, "thresholds beyond"),
        (larger_thresholds, "image"),
        (other_method, "the method 'exact: slopes between -1 and 1' is none for it"),
    ],
)
def test_forged_networks_are_refused(run, tmp_path, forge, message):
    shutil.copytree(run[0], tmp_path / "run")
    f = Forger(tmp_path / "run")
    forge(f)
    f.write()
    code, lines = checker.check(tmp_path / "run")
    assert code == 1 and any(re.search(message, line) for line in lines), lines


def test_numpy_arrays_are_taken_as_they_are():
    """As a frozen network holds them."""
    values, scale = np.array([[1.0, 0.0, 1.0]] * 2), np.array([1.0, 2.0])
    op = operators.LinearSpline(values, scale, (2,), 1.0)
    np.testing.assert_array_equal(op(np.array([[-0.5, 3.0]])), [[0.5, 3.0]])
    assert np.all(np.asarray(op.rounding_error(np.array([[-0.5, 3.0]]))) > 0)
