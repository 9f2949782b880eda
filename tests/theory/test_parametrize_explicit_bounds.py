"""Explicit orthogonal kernels (AOC, BCOP, SC-Fac's order, RKO, dense) of any raw arrays: norms, and misuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_helpers import relative
from tiers import everyday

from lipjax.parametrize import aoc, bcop, bjorck

pytestmark = pytest.mark.quick_compiles


def vectors_of(matrix, num_iters=30, scaling=bjorck.ORTHOGONIUM):
    matrix = jnp.asarray(matrix)
    start = jax.tree.map(lambda v: v.astype(matrix.dtype), bjorck.init_vectors(matrix.shape, jax.random.key(7)))
    return _advance(matrix, start, num_iters, scaling)


_advance = jax.jit(bjorck.advance, static_argnums=(2, 3))


def draw(shapes, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * rng.normal(size=shape)) for name, shape in shapes.items()}


def make(raw, sizes, *, method="bjorck", num_iters=30, vectors=None, **options):
    """The kernel, with enough steps for Gaussian matrices unless num_iters says otherwise."""
    if vectors is None:
        needed = [n for n, a in raw.items() if aoc.needs_vectors(n, a.shape, method)]
        vectors = {n: vectors_of(aoc.matrices(n, raw[n])) for n in needed}
    return np.asarray(_made(raw, vectors, sizes, method=method, num_iters=num_iters, **options))


@functools.partial(jax.jit, static_argnums=2, static_argnames=("method", "num_iters", "order", "groups", "dilation"))
def _made(raw, vectors, sizes, **options):
    return aoc.kernel(raw, vectors, *sizes, **options)


def singular_values(kernel, size, strides=1, padding="CIRCULAR", dilation=1):
    """Of the dense matrix of the convolution, tap by tap."""
    kernel = np.asarray(kernel)
    k1, k2, c, o = kernel.shape
    h, w = size
    low = dilation * (k1 - 1) // 2, dilation * (k2 - 1) // 2
    out = [-(-n // strides) for n in size]
    if padding == "ZERO":
        reads = dilation * (k1 - 1) + 1, dilation * (k2 - 1) + 1
        out = [(n + 2 * p - k) // strides + 1 for n, p, k in zip(size, low, reads, strict=True)]
    matrix = np.zeros((*out, o, h, w, c))
    for p1, p2, t1, t2 in np.ndindex(*out, k1, k2):
        x1, x2 = strides * p1 + dilation * t1 - low[0], strides * p2 + dilation * t2 - low[1]
        if padding == "CIRCULAR":
            x1, x2 = x1 % h, x2 % w
        if 0 <= x1 < h and 0 <= x2 < w:
            matrix[p1, p2, :, x1, x2, :] += kernel[t1, t2].T
    return np.linalg.svd(matrix.reshape(out[0] * out[1] * o, -1), compute_uv=False)


CASES = [  # in, out, kernel, strides, order
    (4, 4, 3, 1, "aoc"),
    (3, 5, 3, 1, "aoc"),
    (5, 2, 2, 1, "aoc"),
    (1, 4, 5, 1, "aoc"),
    (4, 16, 4, 2, "aoc"),
    (3, 12, 2, 2, "aoc"),
    (4, 3, 3, 2, "aoc"),
    (4, 4, 1, 1, "aoc"),
    (3, 5, 4, 1, "scfac"),
    (2, 6, 4, 2, "scfac"),
    (4, 3, 1, 1, "scfac"),
]


@pytest.mark.parametrize(("ci", "co", "k", "s", "order"), everyday(CASES, (4, 16, 4, 2, "aoc"), (2, 6, 4, 2, "scfac")))
def test_kernels_preserve_norms_at_any_size_and_contract_with_zeros(ci, co, k, s, order):
    sizes = ci, co, k, s
    raw = draw(aoc.raw_shapes(*sizes, order=order))
    kernel = make(raw, sizes, order=order, num_iters=40)
    assert kernel.shape == (k, k, ci, co)
    for size in ((4, 6), (2 * s, s)):  # the latter: kernels larger than the map
        values = singular_values(kernel, size, s)
        np.testing.assert_allclose(values, 1, rtol=0, atol=1e-12)
    assert singular_values(kernel, (4, 6), s, "ZERO").max() < 1 + 1e-12


DILATED = [  # in, out, kernel, strides, order, groups, dilation
    (8, 8, 3, 1, "aoc", 2, 2),
    (4, 8, 3, 2, "aoc", 1, 3),
    (6, 2, 3, 2, "aoc", 1, 3),
    (4, 16, 2, 2, "aoc", 2, 3),
    (4, 4, 4, 2, "scfac", 2, 3),
]


@pytest.mark.parametrize(
    ("ci", "co", "k", "s", "order", "groups", "dilation"), everyday(DILATED, (4, 16, 2, 2, "aoc", 2, 3))
)
def test_groups_and_dilation_keep_kernels_orthogonal(ci, co, k, s, order, groups, dilation):
    sizes, options = (ci, co, k, s), {"order": order, "groups": groups, "dilation": dilation}
    shapes = aoc.raw_shapes(*sizes, **options)
    assert groups == 1 or all(shape[0] == groups for shape in shapes.values())
    kernel = make(draw(shapes), sizes, num_iters=40, **options)
    assert kernel.shape == (k, k, ci // groups, co)
    for part in np.split(kernel, groups, axis=3):
        for size in ((4, 6), (2 * s, s)):
            values = singular_values(part, size, s, dilation=dilation)
            np.testing.assert_allclose(values, 1, rtol=0, atol=1e-12)
        assert singular_values(part, (7, 6), s, "ZERO", dilation).max() < 1 + 1e-12
    if s > 1 and co > ci:  # control: with a common factor pixels are read several times
        values = singular_values(np.split(kernel, groups, axis=3)[0], (4, 4), s, dilation=s)
        assert values.max() > 1.1 or values.min() < 0.9


def test_single_columns_are_as_short_as_in_the_original():
    """Projectors of rank 1 are divided by their length + 1e-8, so the kernel is that far from orthogonal."""
    raw = draw(aoc.raw_shapes(2, 3, 3))
    assert raw["columns"].shape == (6, 3, 1)
    values = singular_values(make(raw, (2, 3, 3, 1)), (4, 4))
    assert values.max() < 1 + 1e-14 and 1 - 1e-6 < values.min() < 1 - 1e-9


@pytest.mark.parametrize("method", bjorck.METHODS)
@pytest.mark.parametrize(("shape",), everyday([((6, 6),), ((9, 4),), ((4, 9),), ((5, 1),), ((1, 5),)], ((4, 9),)))
def test_dense_methods(method, shape):
    raw = jnp.asarray(np.random.default_rng(1).normal(size=shape))
    found = np.asarray(jax.jit(lambda w, v: bjorck.orthogonalize(w, v, method, 40))(raw, vectors_of(raw)))
    values = np.linalg.svd(found, compute_uv=False)
    assert values.max() < 1 + 1e-13
    if method in ("bjorck", "qr") or shape[0] == shape[1] and method == "exp":
        np.testing.assert_allclose(values, 1, atol=1e-12)
    if method == "bjorck":  # the polar factor
        u, _, v = np.linalg.svd(raw, full_matrices=False)
        np.testing.assert_allclose(found, u @ v, atol=1e-12)
    if method == "qr":
        q, r = np.linalg.qr(raw if shape[0] >= shape[1] else raw.T)
        q = q * np.sign(np.diag(r))
        np.testing.assert_allclose(found, q if shape[0] >= shape[1] else q.T, atol=1e-10)
    if method == "exp":
        from scipy.linalg import expm

        side = max(shape)
        square = np.zeros((side, side))
        square[: shape[0], : shape[1]] = np.asarray(bjorck.scaled(raw, vectors_of(raw)))
        np.testing.assert_allclose(found, expm((square - square.T) / 2)[: shape[0], : shape[1]], atol=1e-13)


def hostile(kind, shape, seed=0):
    """Raw arrays as (..., m, n) matrices that no initialiser makes."""
    rng = np.random.default_rng(seed)
    array = rng.normal(size=shape)
    return {
        "zero": lambda: np.zeros(shape),
        "equal columns": lambda: np.broadcast_to(array[..., :1], shape).copy(),
        "rank one": lambda: array[..., :1] * array[..., :1, :],
        "one zero matrix": lambda: np.where(np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) == 0, 0, array),
        "tiny": lambda: 1e-200 * array,
        "subnormal": lambda: 5e-324 * rng.integers(0, 9, shape),
        "huge": lambda: 1e200 * array,
        "graded": lambda: array * 10.0 ** rng.integers(-12, 12, shape[-1]),
        "signs": lambda: np.sign(array),
    }[kind]()


KINDS = ["zero", "equal columns", "rank one", "one zero matrix", "tiny", "subnormal", "huge", "graded", "signs"]


@functools.partial(jax.jit, static_argnums=2, static_argnames="order")
def _gradient(raw, vectors, sizes, order):
    return jax.grad(lambda raw: jnp.sum(jnp.sin(aoc.kernel(raw, vectors, *sizes, order=order))))(raw)


HOSTILE = [((3, 4, 3, 1), "aoc"), ((2, 6, 4, 2), "aoc"), ((3, 4, 3, 1), "scfac")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sizes", "order"), everyday(HOSTILE, ((2, 6, 4, 2), "aoc")))
def test_hostile_raw_arrays_make_contractions(kind, sizes, order):
    """12 steps or 1, vectors that fit and vectors that do not: never above 1, never a NaN, finite gradients."""
    shapes = aoc.raw_shapes(*sizes, order=order)
    raw = {n: jnp.asarray(hostile(kind, shape)) for n, shape in shapes.items()}
    needed = [n for n, shape in shapes.items() if aoc.needs_vectors(n, shape, "bjorck")]
    fit = {n: vectors_of(aoc.matrices(n, raw[n])) for n in needed}
    unfit = jax.tree.map(lambda v: jnp.where(jnp.arange(v.shape[-1]) == 0, v, 0.0), fit)
    for vectors in (fit, unfit, jax.tree.map(jnp.zeros_like, fit)):
        for steps in (1, 12):
            kernel = make(raw, sizes, vectors=vectors, num_iters=steps, order=order)
            assert singular_values(kernel, (4, 4), sizes[3]).max() < 1 + 1e-12
    gradient = _gradient(raw, fit, sizes, order=order)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


_orthogonal = jax.jit(bjorck.orthogonalize, static_argnums=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", bjorck.METHODS)
def test_hostile_matrices_make_contractions(kind, method):
    raw = jnp.asarray(hostile(kind, (7, 5)))
    for vectors in (vectors_of(raw), {"u": jnp.zeros(7), "v": jnp.zeros(5)}):
        found = _orthogonal(raw, vectors, method)
        if kind == "huge" and method in ("qr", "cholesky"):
            continue  # squares overflow: what is stored is not finite, and cannot be frozen
        assert np.linalg.norm(found, 2) < 1 + 1e-13


def test_an_iteration_without_a_ceiling_diverges():
    """Control: what `scaled` adds to the original. Vectors that know nothing of the matrix leave its norm above 2."""
    raw = jnp.asarray(np.diag([100.0, 1.0, 1.0]))
    unfit = {"u": jnp.array([0.0, 1.0, 0.0]), "v": jnp.array([0.0, 1.0, 0.0])}
    assert np.linalg.norm(bjorck.iterate(bjorck.scaled(raw, unfit)), 2) <= 1 + 1e-14
    assert not np.linalg.norm(bjorck.iterate(raw / 1.0, 4), 2) < 1e9
    rng = np.random.default_rng(0)
    for shape in ((3, 3), (40, 7), (7, 40), (1, 1)):
        matrices = rng.normal(size=(5, *shape))
        norms = np.linalg.norm(matrices, 2, axis=(1, 2))
        ceiling = np.asarray(bjorck.norm_ceiling(jnp.asarray(matrices)))
        assert (ceiling >= norms * (1 - 1e-14)).all()
        assert (ceiling <= norms * min(shape) ** (1 / 16) * (1 + 1e-14)).all()


def test_unconverged_block_convolutions_contract():
    raw = jnp.asarray(np.random.default_rng(3).normal(size=bcop.raw_shape(4, 6, 3)))
    vectors = vectors_of(raw, scaling=bjorck.LCONVNET)
    for steps, least in ((1, 0.0), (7, 0.0), (60, 1 - 1e-12)):
        kernel = jax.jit(functools.partial(bcop.kernel, in_channels=4, out_channels=6, num_iters=steps))(raw, vectors)
        values = singular_values(kernel, (4, 5))
        assert values.max() < 1 + 1e-12 and values.min() >= least
    assert singular_values(kernel, (2, 2)).min() > 1 - 1e-12  # a kernel larger than the map
    one = jax.jit(functools.partial(bcop.kernel, in_channels=2, out_channels=6))(raw[:1], vectors_of(raw[:1]))
    assert one.shape == (1, 1, 2, 6)  # where the original's kernel has its axes exchanged


def test_patches_contract_whether_they_overlap_or_not():
    raw = jnp.asarray(np.random.default_rng(4).normal(size=(3, 3, 2, 5)))
    vectors = vectors_of(bjorck.as_matrix(raw))
    for strides in (1, 2, 3):
        kernel = jax.jit(functools.partial(bjorck.rko, strides=strides, num_iters=40))(raw, vectors)
        values = singular_values(kernel, (6, 6), strides)
        assert values.max() < 1 + 1e-12
        assert (values.min() > 1 - 1e-12) == (strides == 3)


def test_vectors_are_arguments_and_advance_apart():
    raw = jnp.asarray(np.random.default_rng(5).normal(size=(4, 6, 3)))
    vectors = bjorck.init_vectors((4, 6, 3), jax.random.key(0))
    assert {n: v.shape for n, v in vectors.items()} == {"u": (4, 6), "v": (4, 3)}
    same = _advance(raw, vectors, 0)
    assert all(np.array_equal(same[n], vectors[n]) for n in "uv")
    far = _advance(raw, vectors, 300)
    sigma = np.einsum("bi,bij,bj->b", far["u"], raw, far["v"])
    np.testing.assert_allclose(sigma, np.linalg.norm(raw, 2, axis=(1, 2)), rtol=1e-7)  # lengths are 1e-8 below 1
    zero = _advance(jnp.zeros((4, 6, 3)), vectors, 2)  # kept: zero vectors would stay zero for ever
    assert all(np.array_equal(zero[n], vectors[n]) for n in "uv")
    # No gradient through the vectors, one through the norm.
    assert not np.any(jax.jit(jax.grad(lambda w: jnp.sum(bjorck.advance(w, vectors, 2)["u"])))(raw))
    along = jax.jit(jax.grad(lambda w: jnp.sum(bjorck.scaled(w, far) * raw)))(raw)
    constant = jax.jit(jax.grad(lambda w: jnp.sum(bjorck.scaled(w, far, bjorck.LCONVNET) * raw)))(raw)
    assert relative(along, constant) > 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aoc.raw_shapes(4, 4, 2, 3), r"kernel_size >= strides, got kernel_size 2 and strides 3.*3 or more"),
        (
            lambda: aoc.raw_shapes(4, 4, 3, 2, order="scfac"),
            r"that strides divide .*kernel_size 3 and strides 2.*2 or 4",
        ),
        (lambda: aoc.raw_shapes(4, 4, 3, rank=4), r"a rank from 1 to 3 .* on 4 channels.*got 4. None takes"),
        (lambda: aoc.raw_shapes(4, 4, 3, rank=0), r"a rank from 1 to 3 .*got 0"),
        (lambda: aoc.raw_shapes(1, 1, 3), r"at least 2 channels .*got 1.*more features"),
        (lambda: aoc.raw_shapes(4, 0, 3), r"of at least 1, got 4 -> 0 channels"),
        (lambda: aoc.raw_shapes(4, 6, 3, groups=4), r"groups >= 1 that divide the channels, got 4 groups and 4 -> 6"),
        (lambda: aoc.raw_shapes(4, 4, 3, groups=4), r"at least 2 channels .*got 1"),
        (lambda: aoc.raw_shapes(4, 4, 4, 2, dilation=2), r"no factor in common .*dilation 2 and strides 2"),
        (lambda: aoc.raw_shapes(4, 4, 3, dilation=0), r"a dilation >= 1"),
        (lambda: aoc.raw_shapes(4, 4, 3, order="bcop"), r"an order out of aoc, scfac, got 'bcop'"),
        (lambda: make(draw({"columns": (5, 4, 2)}), (4, 4, 3, 1)), r"raw arrays .*\(6, 4, 2\).*got .*\(5, 4, 2\)"),
        (lambda: bcop.raw_shape(4, 4, 0), r"kernel_size of at least 1"),
        (lambda: bcop.kernel(jnp.ones((5, 4, 4)), {}, 4, 5), r"\(5, 5, 5\) for 4 -> 5 channels, got \(5, 4, 4\)"),
        (lambda: bjorck.rko(jnp.ones((2, 2, 1, 1)), {}, strides=3), r"strides from 1 to .*got strides 3 for 2 x 2"),
        (lambda: bjorck.orthogonalize(jnp.eye(2), {}, "svd"), r"a method out of bjorck, qr, exp, cholesky, got 'svd'"),
        (lambda: bjorck.iterate(jnp.eye(2), 0), r"num_iters >= 1, got 0"),
        (lambda: bjorck.advance(jnp.eye(2), {"u": jnp.ones(2), "v": jnp.ones(2)}, -1), r"num_iters >= 0, got -1"),
    ],
)
def test_misuse_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_rank_out_of_range_of_a_block_convolution():
    raw = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 4)))
    with pytest.raises(ValueError, match="a rank from 1 to 3 .* got 9"):
        bcop.kernel(raw, vectors_of(raw), 4, 4, rank=9)
    make = jax.jit(bcop.kernel, static_argnums=(2, 3), static_argnames=("rank", "num_iters"))
    made = {rank: make(raw, vectors_of(raw), 4, 4, rank=rank, num_iters=80) for rank in (1, 2, 3, None)}
    assert np.array_equal(made[2], made[None]) and relative(made[1], made[3]) > 0.1
    assert all(singular_values(kernel, (3, 3)).min() > 1 - 1e-12 for kernel in made.values())
