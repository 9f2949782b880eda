"""LipLT on the network of the papers' code: constants, vectors and gradients."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from liplt_helpers import ONE, estimate, off_diagonal, on_host

from lipjax import bounds
from lipjax.operators import (
    Conv,
    Dense,
    Flatten,
)

pytestmark = pytest.mark.quick_compiles

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "crm_liplt.npz"


@functools.cache
def golden():
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files if name != "meta"}


def golden_operators():
    found = golden()
    kernels = [jnp.asarray(found[f"param/linear.{n}.weight"].transpose(2, 3, 1, 0)) for n in (0, 2, 4)]
    shapes, strides = [(16, 16, 3), (16, 16, 4), (8, 8, 6)], (1, 2, 2)
    convs = [Conv(k, shape, s, ONE) for k, shape, s in zip(kernels, shapes, strides, strict=True)]
    first, last = (found[f"param/linear.{n}.weight"] for n in (7, 9))
    first = first.reshape(24, 8, 4, 4).transpose(0, 2, 3, 1).reshape(24, -1)  # flattened as (c, h, w) there
    return [*convs, Flatten((4, 4, 8)), Dense(jnp.asarray(first)), Dense(jnp.asarray(last))]


def golden_vectors(prefix):
    found = {}
    for s in range(4):
        v = golden()[f"input/{prefix}/{s}"]
        v = v.reshape(-1, 8, 4, 4) if s == 3 else v
        v = v.transpose(0, 2, 3, 1)
        found[str(s)] = jnp.asarray(v.reshape(1, -1) if s == 3 else v)
    return found


def test_three_iterations_are_those_of_the_papers_code():
    pairwise, found = estimate(golden_operators(), golden_vectors("pi_start"), 3)
    np.testing.assert_allclose(found.constants, golden()["output/liplt_m_3it"], rtol=1e-12)
    np.testing.assert_allclose(off_diagonal(pairwise), off_diagonal(golden()["output/liplt_pairwise_3it"]), rtol=1e-12)
    # the start vectors matter: these are not the converged values
    assert abs(found.constants[-1] / golden()["output/liplt_m_exact"][-1] - 1) > 1e-3


@pytest.mark.nightly
def test_converged_constants_are_the_exact_ones():
    operators = golden_operators()
    pairwise, found = estimate(operators, golden_vectors("pi_start"), 4000)
    exact = golden()
    for value, name in (
        (found.constants, "m"),
        (found.per_class, "per_class"),
        (found.total, "global"),
        (off_diagonal(pairwise), "pairwise"),
        (off_diagonal(found.fallback), "pairwise_fallback"),
    ):
        wanted = exact[f"output/liplt_{name}_exact"]
        wanted = off_diagonal(wanted) if wanted.ndim == 2 else wanted
        np.testing.assert_allclose(value, wanted, rtol=2e-5)  # close singular values: from below
        assert (np.asarray(value) <= wanted * (1 + 1e-12)).all()
    few, _ = estimate(operators, golden_vectors("pi_start"), 4000, max_rows=9)
    np.testing.assert_allclose(few, found.fallback, rtol=1e-12)


def test_gradient_is_that_of_the_papers_code():
    keep = jnp.asarray(golden()["input/pairwise_cotangent"] * (1 - np.eye(10)))
    vectors = golden_vectors("pairwise_grad_vectors")

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(operators):
        pairwise, _ = bounds.liplt_estimate(operators, vectors, 0)
        return jnp.sum(pairwise * keep), pairwise

    grads, pairwise = gradient(golden_operators())
    np.testing.assert_allclose(off_diagonal(pairwise), off_diagonal(golden()["output/pairwise_value"]), rtol=1e-12)
    for i, n in ((0, 0), (1, 2), (2, 4)):
        wanted = golden()[f"output/pairwise_grad/linear.{n}.weight"].transpose(2, 3, 1, 0)
        np.testing.assert_allclose(grads[i].kernel, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())
    first = golden()["output/pairwise_grad/linear.7.weight"].reshape(24, 8, 4, 4).transpose(0, 2, 3, 1)
    for i, wanted in ((4, first.reshape(24, -1)), (5, golden()["output/pairwise_grad/linear.9.weight"])):
        np.testing.assert_allclose(grads[i].matrix, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())


def test_proved_constants_of_the_golden_network():
    pairwise, report = bounds.liplt_bound(on_host(golden_operators()))
    exact = golden()
    excess = off_diagonal(pairwise) / off_diagonal(exact["output/liplt_pairwise_exact"]) - 1
    assert (excess >= 0).all() and (excess < 1e-6).all()
    rows = np.array([row.claimed for row in report.layers]) / exact["output/liplt_m_exact"] - 1
    assert (rows > -1e-13).all() and (rows < 1e-6).all()
    assert 0 <= report.total / exact["output/liplt_global_exact"] - 1 < 1e-6
    assert 0 <= report.product / exact["output/naive_global_exact"] - 1 < 1e-6
    excess = report.per_class / exact["output/liplt_per_class_exact"] - 1
    assert (excess > -1e-13).all() and (excess < 1e-6).all()
    assert len(report.chains) == 10 and all(row.claimed <= row.product for row in report.layers)
    assert (np.diag(pairwise) == 0).all() and (pairwise == pairwise.T).all()
