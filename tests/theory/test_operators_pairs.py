"""Operators on pairs: parity through stored directions, exact oracles for the rounding errors, what is refused."""

import decimal
import functools
import math
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipjax import activations, operators, pooling, spectral
from lipjax.certify import FrozenNetwork
from lipjax.errors import NotCertifiable
from lipjax.network import make_network
from lipjax.numerics import UNDERFLOW_OF_OPERATOR, gamma

GOLDEN = Path(__file__).parents[1] / "golden"


def build(name, angles, in_shape):
    """The operator of a layer with these angles."""
    if name == "Householder":
        return operators.Householder(activations.householder_direction(*angles), in_shape)
    if name == "Householder2":
        return operators.Householder2(activations.householder2_directions(*angles), in_shape)
    if name == "ProjectionPool":
        return operators.ProjectionPool(pooling.wedge_direction(*angles), in_shape)
    return getattr(operators, name)(in_shape)


CASES = {
    "MaxMin": ("act_maxmin", ()),
    "Householder": ("act_hh1", ("theta",)),
    "Householder2": ("act_hh2", ("theta0", "theta1", "theta2")),
    "ProjectionPool": ("pool_lip1", ("theta",)),
    "MaxPoolPairs": ("pool_max", ()),
}


@pytest.mark.parametrize("name", CASES)
def test_golden_values_and_gradients_through_directions(name):
    file, params = CASES[name]
    z = np.load(GOLDEN / f"{file}.npz")

    def nhwc(key):
        return np.moveaxis(z[key], 1, -1)

    x, cotangent, smooth = nhwc("input/z"), nhwc("input/cotangent"), nhwc("input/smooth_mask") == 1
    if name == "Householder2":  # where the original is 0 by defect, and so is its gradient
        cotangent = np.where(nhwc("input/defect_mask") == 1, 0.0, cotangent)

    @jax.jit
    def run(x, angles, cotangent):
        y, vjp = jax.vjp(lambda x, *angles: build(name, angles, x.shape[1:])(x), x, *angles)
        return y, *vjp(cotangent)

    angles = [jnp.asarray(z[f"param/{p}"].ravel()) for p in params]
    y, grad, *grads = run(jnp.asarray(x), angles, jnp.asarray(cotangent))
    value = nhwc("output/y_fixed" if name == "Householder2" else "output/y")
    np.testing.assert_allclose(y, value, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.asarray(grad)[smooth], nhwc("output/grad_z")[smooth], rtol=1e-9, atol=1e-12)
    for p, found in zip(params, grads, strict=True):
        np.testing.assert_allclose(found, z[f"output/grad/{p}"].ravel(), rtol=1e-9, atol=1e-12)


# ---- exact oracles: pairs of fractions as complex numbers ----


def exact(v):
    return Fraction(float(v[0])), Fraction(float(v[1]))


def times(v, w):
    return v[0] * w[0] - v[1] * w[1], v[0] * w[1] + v[1] * w[0]


def conj(v):
    return v[0], -v[1]


def square(v):
    """v^2 / |v|^2"""
    size = v[0] ** 2 + v[1] ** 2
    return tuple(c / size for c in times(v, v))


def angle_key(v):
    """Increases with the angle of v in [0, 2 pi), exactly: the half plane, then -cot."""
    if v[1] == 0:
        return (0 if v[0] > 0 else 1), -math.inf
    return (0 if v[1] > 0 else 1), -v[0] / v[1]


def exact_householder(direction, z):
    d = exact(direction)
    right = d[1] * z[0] - d[0] * z[1]
    return times(square(d), conj(z)) if right > 0 else z


def exact_householder2(directions, z):
    """By the order of angles counted from the first ray."""
    p, q, r = map(exact, directions)
    turned, at = angle_key(times(conj(p), z)), angle_key
    q_is_pi, r_is_pi = (v[1] == 0 and v[0] < 0 for v in (q, r))
    if turned <= at(q):
        return z
    if not r_is_pi and turned >= at((-r[0], -r[1])):
        return times(square(p), conj(z))
    if (q_is_pi and r_is_pi) or turned <= at(times(q, r)):
        return times(square(times(p, q)), conj(z))
    return times(conj(square(r)), z)


def exact_wedge(direction, z):
    with decimal.localcontext(prec=120):
        (cos, sin), (a, b) = map(decimal.Decimal, direction), (decimal.Decimal(float(c)) for c in z)
        length = (cos * cos + sin * sin).sqrt()
        along, across = cos * a + sin * abs(b), cos * abs(b) - sin * a
        return (Fraction(across / length if along >= 0 else (a * a + b * b).sqrt()),)


ORACLES = {"Householder": exact_householder, "Householder2": exact_householder2, "ProjectionPool": exact_wedge}


def hostile_directions(name):
    """Columns of stored directions: horizontal, vertical, almost so, of lengths other than 1, of extreme angles."""
    rng = np.random.default_rng(0)
    wedge = [(1.0, 0.0), (0.0, 1.0), (1.0, 1e-300), (6e-17, 1.0), (0.6, 0.8), (0.7, 1.3), (1e-160, 0.9)]
    above = [*wedge, (-1.0, 0.0), (-1.0, 1e-17), (-0.9, 1e-300), (-0.3, 1.1), (-1e-160, 1.0)]
    around = [*above[2:7], (-1.0, 0.0), (0.6, -0.4), (-0.8, -1e-17), (1e-300, -1.0)]
    if name == "ProjectionPool":
        return np.array(wedge).T
    if name == "Householder":
        return np.array(around).T
    starts = (around[0], around[5], around[6])
    triples = [(starts[(i + j) % 3], q, r) for i, q in enumerate(above) for j, r in enumerate(above)]
    triples += [(rng.normal(size=2), np.abs(rng.normal(size=2)), np.abs(rng.normal(size=2))) for _ in range(20)]
    triples = np.moveaxis(np.array(triples), 0, -1)
    lengths = np.sqrt((triples**2).sum(axis=1, keepdims=True))
    return np.where((lengths > 2) | (lengths < 0.5), triples / lengths, triples)


def hostile_points(name, direction, rng):
    """Points on, beside and opposite to the rays where the map bends, for one direction (or triple)."""
    if name == "Householder2":
        p, q, r = (complex(*v) for v in direction)
        rays = [p, p * q, p * q * r, -p * r]
    else:
        d = complex(*direction)
        rays = [d, d * 1j, d.conjugate(), d.conjugate() * 1j]
    points = [0j, complex(-0.0, -0.0)]
    for ray in rays:
        for sign in (1, -1):
            base = sign * ray * 10.0 ** rng.integers(-3, 4)
            points += [base, base * (1 + 2e-16j), base * (1 - 2e-16j), base * (1 + 1e-9j)]
            points.append(complex(np.nextafter(base.real, 9e9), base.imag) * rng.choice([1e-140, 1, 1e140]))
            points.append(complex(base.real, 0.0) * rng.choice([1e-10, 1]))
    points += [complex(0.0, b) for b in (1.0, -1.0)] + [complex(*v) for v in rng.normal(size=(4, 2))]
    return np.array([(v.real, v.imag) for v in points])


@functools.cache
def hostile_case(name):
    """An operator with hostile directions, and inputs (n, C) hostile for each of them."""
    directions, rng = hostile_directions(name), np.random.default_rng(1)
    pairs = directions.shape[-1]
    points = np.stack([hostile_points(name, directions[..., i], rng) for i in range(pairs)], axis=-1)
    op = getattr(operators, name)(jnp.asarray(directions), (2 * pairs,))
    op.check()
    return op, points.reshape(len(points), -1)


@pytest.mark.parametrize("name", ORACLES)
def test_rounding_error_covers_the_distance_to_exact_arithmetic(name):
    op, x = hostile_case(name)
    directions = np.asarray(op.directions if name == "Householder2" else op.direction)
    pairs = directions.shape[-1]
    y = np.asarray(jax.jit(lambda op, x: op(x))(op, jnp.asarray(x)))
    claimed = np.asarray(jax.jit(lambda op, x: op.rounding_error(x))(op, jnp.asarray(x)))
    largest, swapped = 0.0, 0.0
    for row, got, bound in zip(x, y, claimed, strict=True):
        total = Fraction(0)
        for i in range(pairs):
            z, found = exact(row[i::pairs]), [Fraction(float(v)) for v in got[i::pairs]]
            wanted = ORACLES[name](directions[..., i], z)
            error = sum((w - f) ** 2 for w, f in zip(wanted, found, strict=True))
            total += error
            # The claim is a multiple of |x|, so it must hold for each pair alone.
            size = math.hypot(*row[i::pairs])
            allowed = gamma(type(op)._roundings) * size + UNDERFLOW_OF_OPERATOR * (1 + size)
            assert error <= Fraction(allowed) ** 2, (directions[..., i], row[i::pairs])
            largest = max(largest, float(error) ** 0.5 / allowed)
            if name == "Householder2":  # control: the oracle of other directions is far from it
                other = ORACLES[name](directions[[0, 2, 1], :, i], z)
                swapped = max(swapped, float(sum((w - f) ** 2 for w, f in zip(other, found, strict=True))) ** 0.5)
        assert total <= Fraction(float(bound) + UNDERFLOW_OF_OPERATOR * (1 + np.linalg.norm(row))) ** 2
    assert 1e-3 < largest < 1  # control: rounding does happen
    assert name != "Householder2" or swapped > 1


@pytest.mark.parametrize("name", ORACLES)
def test_the_exact_map_is_1_lipschitz_whatever_is_stored(name):
    """In rational arithmetic, between all neighbours among hostile points; without any tolerance for the folds."""
    op, x = hostile_case(name)
    directions = np.asarray(op.directions if name == "Householder2" else op.direction)
    pairs = directions.shape[-1]
    slack = 1 if name != "ProjectionPool" else 1 + Fraction(1, 10**90)  # of square roots to 120 digits
    stretched = False
    for i in range(0, pairs, 7 if name == "Householder2" else 1):
        points = [exact(row[i::pairs]) for row in x]
        values = [ORACLES[name](directions[..., i], z) for z in points]
        for j, (z, value) in enumerate(zip(points, values, strict=True)):
            for other, moved in zip(points[:j], values[:j], strict=True):
                apart = sum((a - b) ** 2 for a, b in zip(z, other, strict=True))
                assert sum((a - b) ** 2 for a, b in zip(value, moved, strict=True)) <= apart * slack
            # Control: with its sign changed, one value would be further from the others.
            stretched |= sum((a + b) ** 2 for a, b in zip(value, values[0 if j < 9 else 8], strict=True)) > sum(
                (a - b) ** 2 for a, b in zip(z, points[0 if j < 9 else 8], strict=True)
            )
    assert stretched


def test_a_half_turn_of_a_degenerate_sector_is_not_taken_for_it():
    """theta1 = 0 and 2 pi: a sector that is a ray, or a half plane; points opposite to the ray lie on its line too."""
    sectors = [
        ((1.0, 0.0), (1.0, 0.0)),
        ((-1.0, 0.0), (1.0, 0.0)),
        ((1.0, 0.0), (-1.0, 0.0)),
        ((-1.0, 0.0), (-1.0, 0.0)),
    ]
    directions = np.moveaxis(np.array([((1.0, 0.0), q, r) for q, r in sectors]), 0, -1)
    op = operators.Householder2(jnp.asarray(directions), (8,))
    for z in [(1.0, 0.0), (-1.0, 0.0), (1.0, -0.0), (-1.0, -0.0), (0.3, 1.0), (-0.3, 1.0), (0.3, -1.0), (-0.3, -1.0)]:
        got = np.asarray(op(jnp.repeat(jnp.asarray(z), 4)[None]))[0].reshape(2, 4)
        for i in range(4):
            wanted = exact_householder2(directions[..., i], exact(z))
            np.testing.assert_array_equal(got[:, i], [float(v) for v in wanted])


@pytest.mark.parametrize("name", CASES)
def test_bound_is_1_and_shapes_follow(name):
    angles = [jnp.linspace(0.0, 3.0, 3)] * len(CASES[name][1])
    op = build(name, angles, (4, 5, 6))
    assert op.bound().proved == 1.0 and spectral.norm_bound(op) == 1.0
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 6))
    assert op(x).shape == (2, *op.out_shape) and op.out_shape[-1] == (3 if "Pool" in name else 6)
    assert op.rounding_error(x).shape == (2,)
    if not angles:
        assert (op.rounding_error(x) == 0).all()
    leaves, tree = jax.tree.flatten(op)
    assert len(leaves) == (1 if angles else 0)
    again = jax.tree.unflatten(tree, leaves)
    np.testing.assert_array_equal(again(x), op(x))
    with pytest.raises(ValueError, match="expects a batch"):
        op(x[0])
    with pytest.raises(ValueError, match="even number of them"):
        build(name, angles, (4, 5, 7))


@pytest.mark.parametrize("name", ORACLES)
def test_directions_without_a_proof_are_refused(name):
    field = "directions" if name == "Householder2" else "direction"
    good = np.asarray(hostile_directions(name))[..., :3]

    def with_directions(values):
        return getattr(operators, name)(**{field: values}, in_shape=(6,))

    operator = with_directions(good)
    with pytest.raises(ValueError, match=f"{field} of shape .*, got"):
        with_directions(good[..., :1])  # it would broadcast
    bad = [0 * good, 1e-200 * good, 1e200 * good, np.nan * good]
    if name != "Householder":  # components that must not be negative
        bad.append(good * np.array([1.0, -1.0])[:, None] - [[0], [1e-3]])
    for values in bad:
        with pytest.raises(ValueError, match=f"Expected {field}.*got"):
            with_directions(values)
        with pytest.raises(NotCertifiable, match=name):
            jax.tree.map(lambda _, v=values: v, operator).bound()  # past the constructor
    # No values while tracing: only the shape is looked at, and nothing is proved.
    jax.eval_shape(lambda v: with_directions(v), jnp.zeros(good.shape))
    with pytest.raises(NotCertifiable, match=f"{name}: {field}.*tracing"):
        jax.eval_shape(lambda v: with_directions(v).bound().proved, jnp.zeros(good.shape))


def test_a_frozen_network_of_them_certifies_and_comes_back(tmp_path):
    rng = np.random.default_rng(2)
    theta = jnp.asarray(rng.uniform(0, 6, (5, 4)))
    cuts = {"Householder": theta[:1], "Householder2": theta[1:4], "ProjectionPool": theta[4:]}
    ops = [(name, build(name, list(angles), (8,))) for name, angles in cuts.items()]
    ops += [("MaxMin", operators.MaxMin((4,))), ("MaxPoolPairs", operators.MaxPoolPairs((4,)))]
    head = operators.LinearHead(jnp.asarray(rng.normal(size=(3, 2))), jnp.asarray(rng.normal(size=3)))
    frozen = FrozenNetwork(jax.tree.map(np.asarray, make_network(ops, head)))
    assert all(row.claimed == 1 for row in frozen.lipschitz_report())
    np.testing.assert_allclose(frozen.margin_lipschitz(), head.pairwise_bound(), rtol=1e-15)  # rounded upwards
    x = rng.uniform(size=(20, 8))
    certificate = frozen.certify(x)
    assert (certificate.radii > 1e-3).any()
    step = rng.normal(size=(100, 20, 8))
    step *= certificate.radii[:, None] / np.linalg.norm(step, axis=-1, keepdims=True)
    moved = np.clip(x + step, 0, 1)  # moves no further: x lies in the box
    assert (frozen(moved.reshape(-1, 8)).argmax(axis=1).reshape(100, 20) == certificate.predictions).all()
    frozen.save(tmp_path)
    np.testing.assert_array_equal(FrozenNetwork.load(tmp_path)(x), frozen(x))


@pytest.mark.parametrize("name", ORACLES)
def test_sines_are_computed_once_and_not_per_element(name):
    """XLA would fuse them into the loops over the batch, and compute them anew for every element."""
    shape, angles = (7, 11, 13, 6), [jnp.linspace(0.1, 3.0, 3)] * len(CASES[name][1])

    def loss(x, angles):
        return jnp.sum(build(name, angles, shape[1:])(x) ** 2)

    text = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.ones(shape), angles).compile().as_text()
    blocks = [block for block in text.split("\n\n") if " sine(" in block or " cosine(" in block]
    assert blocks and not any("[7,11,13," in block for block in blocks if "ENTRY" not in block)


@pytest.mark.x64_off
@pytest.mark.parametrize("name", CASES)
def test_float32_stays_float32(name):
    angles = [jnp.linspace(0.0, 2 * math.pi, 4)] * len(CASES[name][1])
    x = jax.random.normal(jax.random.key(1), (30, 8))

    def loss(x, angles):
        y = build(name, angles, (8,))(x)
        return jnp.sum(y**2), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, angles)
    if angles:
        build(name, angles, (8,)).check()
    assert all(a.dtype == jnp.float32 and jnp.isfinite(a).all() for a in (y, *jax.tree.leaves(grads)))
    # Folds keep norms, so the gradient of |y|^2 is 2 x.
    if "Householder" in name or name == "MaxMin":
        np.testing.assert_allclose(grads[0], 2 * x, atol=1e-5)
