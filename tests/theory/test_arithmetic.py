"""What proofs take for granted is tested before they are made: the rounding mode, and numbers that float64 holds."""

import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from rounding_helpers import MODES, rounding

import lipjax
from lipjax import bounds, curvature, operators, spectral
from lipjax.certify.float64 import check_arithmetic
from lipjax.errors import NotCertifiable
from lipjax.network import make_network
from lipjax.numerics import gamma
from lipjax.spectral import arithmetic

pytestmark = pytest.mark.filterwarnings("error")
RNG = np.random.default_rng(0)


def mlp_head():
    return operators.MLPHead(RNG.normal(size=(4, 3)), np.zeros(4), RNG.normal(size=(2, 4)), np.zeros(2))


def frozen(head=None):
    head = operators.LinearHead(np.eye(2, 3), np.zeros(2)) if head is None else head
    return lipjax.FrozenNetwork(make_network([("dense", operators.Dense(RNG.normal(size=(3, 3))))], head))


def skew():
    return np.asarray(lipjax.conv.skew_kernel(jnp.asarray(RNG.normal(size=(3, 3, 2, 2)))))


DENSE, IMAGE = np.ones((2, 2)), (4, 4, 2)
# Everything that is called a proof, on arrays that could be bounded.
PROOFS = {
    "matrix_norm_bound": lambda: spectral.matrix_norm_bound(DENSE),
    "conv_norm_bound": lambda: spectral.conv_norm_bound(np.ones((3, 3, 2, 2)), IMAGE, 1, "CIRCULAR"),
    "response_norm_bound": lambda: spectral.response_norm_bound(np.ones((4, 3, 2, 2), complex), (4, 4)),
    "blocks_norm_bound": lambda: spectral.blocks_norm_bound(np.ones((1, 2, 2)), np.ones((3, 2, 2, 2))),
    "norm_bound": lambda: spectral.norm_bound(operators.Dense(DENSE)),
    "Conv": lambda: operators.Conv(np.ones((3, 3, 2, 2)), IMAGE).bound(),
    "ConvExponential": lambda: operators.ConvExponential(skew(), IMAGE, 5).bound(),
    "CircularConv": lambda: operators.CircularConv(np.ones((4, 3, 2, 2), complex), IMAGE).bound(),
    "Normalize": lambda: operators.Normalize(np.zeros(1), np.full(1, 0.3), IMAGE).bound(),
    "LinearHead": lambda: operators.LinearHead(DENSE, np.zeros(2)).pairwise_bound(),
    "MLPHead": lambda: mlp_head().pairwise_bound(),
    "curvature": lambda: curvature.bound(RNG.normal(size=(4, 3)), RNG.normal(size=(2, 4)), 0, 1),
    "liplt_bound": lambda: bounds.liplt_bound([operators.Dense(DENSE), operators.Dense(DENSE)]),
    "margin_lipschitz": lambda: frozen().margin_lipschitz(),
    "margin_lipschitz_bound": lambda: bounds.margin_lipschitz_bound(frozen().network),
    "certify": lambda: frozen().certify(np.full((1, 3), 0.5)),
    "certify, MLP": lambda: frozen(mlp_head()).certify(np.full((1, 3), 0.5)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PROOFS)
def test_nothing_is_proved_in_another_rounding_mode(name, mode):
    PROOFS[name]()  # control
    with rounding(mode), pytest.raises(NotCertifiable, match="round to nearest"):
        PROOFS[name]()
    PROOFS[name]()


@pytest.mark.parametrize("mode", MODES)
def test_each_operation_alone_tells_every_mode_apart(mode, monkeypatch):
    def refused():
        with rounding(mode):
            try:
                arithmetic.check_rounding()
            except NotCertifiable:
                return True
            return False

    a, b, c, d = arithmetic.operands()
    with rounding(mode):
        directed = {
            "_SUMS": (a, b, a + b),
            "_PRODUCTS": (c, d, c * d),
            "_QUOTIENTS": (*arithmetic._QUOTIENTS[:2], arithmetic._QUOTIENTS[0] / arithmetic._QUOTIENTS[1]),
            "_ROOTS": (arithmetic._ROOTS[0], np.sqrt(arithmetic._ROOTS[0])),
            "_ROW_SUMS": arithmetic._MATRIX @ np.ones((2, 2)),
        }
    for kept in directed:  # the expected results of all others made those of this mode: one operation is left to see it
        with monkeypatch.context() as patch:
            for name in directed:
                if name != kept:
                    patch.setattr(arithmetic, name, directed[name])
            assert refused(), kept
    with monkeypatch.context() as patch:  # control: with all of them made so, nothing is left
        for name, value in directed.items():
            patch.setattr(arithmetic, name, value)
        assert not refused()


def test_flushed_subnormals_are_noticed(monkeypatch):
    arithmetic.check_rounding()
    monkeypatch.setattr(arithmetic, "_SMALL_PRODUCTS", np.array([0.0, 2.0**-1074, 2.0**-1073]))
    with pytest.raises(NotCertifiable, match="subnormal"):
        arithmetic.check_rounding()


def test_xla_is_tested_as_well(monkeypatch):
    check_arithmetic()
    upward = "lipjax.certify.float64._sums_and_products"
    monkeypatch.setattr(upward, lambda a, b, c, d: (np.nextafter(a + b, np.inf), c * d))
    with pytest.raises(NotCertifiable, match="XLA does not round"):
        check_arithmetic()


def test_sums_that_are_too_long_are_refused():
    with pytest.raises(NotCertifiable, match="at most 9,000,000"):
        gamma(10_000_000)
    wide = (3001, 3001, 1)
    network = make_network(
        [("wide", operators.ReLU(wide)), ("flat", operators.Flatten(wide))],
        operators.LinearHead(np.ones((2, 3001**2), np.float32), np.zeros(2, np.float32)),
    )
    with pytest.raises(NotCertifiable, match=r"input \(Normalize\) has 9,006,001 numbers"):
        bounds.operator_bounds(network)
    with pytest.raises(NotCertifiable, match="9,006,001 numbers"):
        bounds.liplt_bound([operators.Flatten(wide)])
    assert gamma(9_000_000) > 0  # control


def test_the_blas_is_named():
    names = arithmetic.blas_libraries()
    assert any(name.startswith("NumPy's: ") for name in names) and len(names) >= 1


HOLDERS = {
    "Dense": lambda a: operators.Dense(a).bound().proved,
    "Conv": lambda a: operators.Conv(a[None, None], (2, 2, 3)).bound().proved,
    "norm_bound": lambda a: spectral.norm_bound(operators.Dense(a)),
    "LinearHead": lambda a: operators.LinearHead(a, np.zeros(3)).pairwise_bound()[0, 1],
    "MLPHead w1": lambda a: operators.MLPHead(a, np.zeros(3), np.ones((2, 3)), np.zeros(2)).pairwise_bound()[0, 1],
    "MLPHead w2": lambda a: operators.MLPHead(np.ones((3, 3)), np.zeros(3), a, np.zeros(3)).pairwise_bound()[0, 1],
    "Normalize": lambda a: operators.Normalize(np.zeros(3), a[0], (3,)).bound().proved,
    "CircularConv": lambda a: operators.CircularConv.from_blocks(a[None], np.zeros((0, 2, 3, 3)), (1, 1, 3)).bound(),
    "ConvExponential": lambda a: operators.ConvExponential((a - a.T)[None, None], (2, 2, 3), 3).bound().proved,
    "Householder": lambda a: operators.Householder(a[:2, :1] / abs(a[:2, :1]), (2,)).bound().proved,
    "liplt_bound": lambda a: bounds.liplt_bound([operators.Dense(a), operators.Dense(a)])[0][0, 1],
    "curvature, w1": lambda a: curvature.bound(a, np.ones((2, 3)) * [[1], [2]], 0, 1),
    "curvature, w2": lambda a: curvature.bound(np.ones((3, 3)), a, 0, 1),
    "conv_norm_bound": lambda a: (
        inspect.unwrap(spectral.conv_norm_bound)(a[None, None], (2, 2, 3), 1, "CIRCULAR").proved
    ),
}
# Words of the message where they are not the key.
WHERE = {
    "norm_bound": "Dense",
    "LinearHead": "head's matrix",
    "MLPHead w1": "head's w1",
    "MLPHead w2": "head's w2",
    "Normalize": "input_std",
    "Householder": "direction",
    "liplt_bound": r"operators\[0\] \(Dense\)",
    "curvature, w1": "w1",
    "curvature, w2": "w2",
}
ENTRIES = np.arange(1.0, 10.0).reshape(3, 3)


@pytest.mark.parametrize("name", HOLDERS)
def test_numbers_that_float64_does_not_hold_are_refused_by_name(name):
    HOLDERS[name](ENTRIES)  # control
    with pytest.raises(NotCertifiable, match=f"{WHERE.get(name, name)}.*got complex128"):
        HOLDERS[name](ENTRIES * (1 + 1j))
    if np.dtype(np.longdouble).itemsize > 8:
        beyond = np.longdouble(1) + np.finfo(np.longdouble).eps
        with pytest.raises(NotCertifiable, match=f"{WHERE.get(name, name)}.*dtype {np.dtype(np.longdouble)}"):
            HOLDERS[name](ENTRIES * beyond)


def test_types_of_arrays():
    for dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int8, np.uint64, bool, ml_dtypes.int4):
        array = np.array([[0, 1], [1, 0]]).astype(dtype)
        found = arithmetic.exact_float64(array, "a")
        assert found.dtype == np.float64 and found.flags.c_contiguous
        np.testing.assert_array_equal(found, [[0, 1], [1, 0]])
    held = np.array([2**53, -(2**53)])
    np.testing.assert_array_equal(arithmetic.exact_float64(held, "a").astype(np.int64), held)
    for wrong, message in (
        (np.array([2**53 + 1]), "up to 2\\^53"),
        (np.array([-(2**63)]), "up to 2\\^53"),
        (np.array([2**64 - 1], np.uint64), "up to 2\\^53"),
        (np.array([1, None]), "object"),
        (np.array([10**40]), "object"),
        (np.array(["1"]), "<U1"),
        (np.ones(1, complex), "real numbers"),
    ):
        with pytest.raises(NotCertifiable, match=f"the name: .*{message}"):
            arithmetic.exact_float64(wrong, "the name")
    assert arithmetic.exact_float64(np.ones(1, np.complex64), "a", or_complex=True).dtype == np.complex128
    with pytest.raises(NotCertifiable, match="clongdouble|complex256"):
        arithmetic.exact_float64(np.ones(1, np.clongdouble), "a", or_complex=True)


@pytest.mark.parametrize("bound", ["Dense", "Conv", "LinearHead", "MLPHead w1", "ConvExponential", "curvature, w1"])
def test_a_proof_under_jit_says_what_to_do(bound):
    HOLDERS[bound](jnp.asarray(ENTRIES))  # control
    with pytest.raises(NotCertifiable, match="JAX is tracing.*outside"):
        jax.jit(HOLDERS[bound])(jnp.asarray(ENTRIES))


def test_matrices_in_batches_and_of_integers():
    batch = RNG.normal(size=(2, 3, 4, 5)) * np.array([1.0, 5.0, 2.0])[:, None, None]
    norms = np.linalg.norm(batch, 2, axis=(2, 3))
    found = spectral.matrix_norm_bound(batch)
    assert norms.max() <= found.proved <= norms.max() * (1 + 1e-8)
    assert norms[tuple(found.details["index"])] == norms.max()
    assert "index" not in spectral.matrix_norm_bound(batch[0, 0]).details
    assert spectral.matrix_norm_bound(np.zeros((2, 3, 3))).proved == 0
    whole = np.array([[3, 0], [0, -4]])
    for dtype in (int, np.int8, np.uint8):
        found = spectral.matrix_norm_bound(whole.astype(dtype) if dtype is not np.uint8 else abs(whole).astype(dtype))
        assert 4 <= found.proved <= 4 * (1 + 1e-9)
    with pytest.raises(NotCertifiable, match="up to 2"):
        spectral.matrix_norm_bound(np.array([[2**53 + 1]]))
    with pytest.raises(ValueError, match="none empty"):
        spectral.matrix_norm_bound(np.zeros((0, 2, 2)))


def test_arrays_in_the_place_of_operators():
    for array in (np.eye(2), jnp.eye(2), [[1.0]]):
        with pytest.raises(ValueError, match="norm_bound takes an operator.*plain .*matrix_norm_bound"):
            spectral.norm_bound(array)
        with pytest.raises(ValueError, match="norm_estimate takes an operator.*plain"):
            spectral.norm_estimate(array, jnp.ones(2), 1)
    with pytest.raises(ValueError, match=r"norm_estimate: MaxMin has no estimate\(\)"):
        spectral.norm_estimate(operators.MaxMin((2,)), jnp.ones(2), 1)
    for call in (bounds.liplt_bound, lambda ops: bounds.liplt_vectors(ops, jax.random.key(0))):
        with pytest.raises(ValueError, match=r"operators\[0\] \(ndarray\): expected an operator, got a plain ndarray"):
            call([np.eye(2), np.eye(2)])
    with pytest.raises(ValueError, match="list of operators.*one Dense"):
        inspect.unwrap(bounds.liplt_bound)(operators.Dense(np.eye(2)))  # jaxtyping would object first here
