"""The circulants by which zero-padded convolutions are proved: against dense matrices and the proved bound."""

import numpy as np
import pytest

from benchmarks import lanczos
from lipjax import conv, operators, spectral
from lipjax.spectral import norms


@pytest.fixture(autouse=True)
def no_dense_proofs(monkeypatch):
    """Small maps are then bounded as large ones are."""
    monkeypatch.setattr(norms, "_DENSE_SIDE", 0)


CASES = {
    "3x3": ((3, 3, 3, 2), (5, 4, 3), 1, "ZERO"),
    "5x5 stride 2": ((5, 5, 2, 3), (7, 6, 2), 2, ((2, 2), (2, 2))),
    "even, unequal strides": ((4, 2, 2, 2), (6, 5, 2), (1, 2), "ZERO"),
    "a column": ((3, 1, 2, 2), (6, 3, 2), 1, "ZERO"),
    "taps that meet only padding": ((5, 3, 2, 2), (2, 6, 2), 1, ((4, 0), (1, 1))),
}


def make(name):
    shape, in_shape, strides, padding = CASES[name]
    kernel = np.random.default_rng(len(name)).normal(size=shape)
    return operators.Conv(kernel, in_shape, strides, padding)


def norm_of(op, size, twist):
    """|y[p] = sum_t K[t] x[s p + t - lo]|, by its matrix; beyond `size` x is periodic up to the sign, or (None) 0."""
    kernel, strides = np.asarray(op.kernel), conv.stride_pair(op.strides)
    (k1, k2, c, o), (h, w) = kernel.shape, size
    low = [pad[0] for pad in conv.explicit_padding((k1, k2), op.padding)]
    out = op.out_shape[:2] if twist is None else [n // s for n, s in zip(size, strides, strict=True)]
    matrix = np.zeros((*out, o, h, w, c))
    for p, q, a, b in np.ndindex(*out, k1, k2):
        (i, m), (j, n) = divmod(strides[0] * p + a - low[0], h), divmod(strides[1] * q + b - low[1], w)
        if twist is not None:
            matrix[p, q, :, m, n] += (-1) ** (twist[0] * i + twist[1] * j) * kernel[a, b].T
        elif i == j == 0:
            matrix[p, q, :, m, n] += kernel[a, b].T
    return np.linalg.norm(matrix.reshape(-1, h * w * c), 2)


@pytest.mark.parametrize("name", CASES)
def test_the_bound_is_the_least_norm_of_its_circulants(name):
    op = make(name)
    bound, least = op.bound(), lanczos.grid_norm(op)
    assert "block circulant" in bound.method
    used, variants = spectral.embeddings(op.kernel.shape, op.in_shape, op.strides, op.pads)
    assert (tuple(bound.details["grid"]), tuple(bound.details["twist"])) in variants
    # Taps that meet only padding are no part of the circulants.
    kept = operators.Conv(np.where(used[..., None, None], op.kernel, 0), op.in_shape, op.strides, op.padding)
    strides = conv.stride_pair(op.strides)
    found = [norm_of(kept, tuple(n * s for n, s in zip(g, strides, strict=True)), twist) for g, twist in variants]
    assert least == pytest.approx(min(found), rel=1e-9)
    assert min(found) * (1 - 1e-12) <= bound.proved <= min(found) * (1 + 1e-8)
    true = norm_of(op, op.in_shape[:2], None)
    assert all(true <= norm * (1 + 1e-12) for norm in found) and true < 0.999 * max(found)


def test_groups_and_dilation_have_circulants_of_their_own():
    kernel = np.random.default_rng(1).normal(size=(3, 3, 2, 6))
    op = operators.Conv(kernel, (6, 5, 4), 1, "ZERO", 2, (2, 1))
    # The least over grids of the largest over groups is not below the largest of the least.
    assert op.bound().proved * (1 - 1e-9) <= lanczos.grid_norm(op) <= op.bound().proved * 1.1


def test_what_is_proved_as_it_is_has_no_circulants(monkeypatch):
    circular = operators.Conv(np.ones((3, 3, 2, 2)), (4, 4, 2), 1, "CIRCULAR")
    patches = operators.Conv(np.ones((2, 2, 2, 2)), (4, 4, 2), 2, "VALID")
    assert lanczos.grid_norm(circular) is None and lanczos.grid_norm(patches) is None
    assert lanczos.grid_norm(make("3x3")) is not None
    monkeypatch.setattr(norms, "_DENSE_SIDE", 4096)
    assert lanczos.grid_norm(make("3x3")) is None


@pytest.mark.parametrize(("cheap", "dear", "count"), [(2e9, 2e11, 8), (0, 2e11, 4), (0, 0, 1)])
def test_as_many_circulants_as_the_proof_tries(monkeypatch, cheap, dear, count):
    monkeypatch.setattr(norms, "_CHEAP", cheap)
    monkeypatch.setattr(norms, "_DEAR", dear)
    op = make("3x3")
    _, variants = spectral.embeddings(op.kernel.shape, op.in_shape, op.strides, op.pads)
    assert len(variants) == count and tuple(op.bound().details["grid"]) in {grid for grid, _ in variants}


def test_shapes_of_embeddings_follow_from_the_kernel():
    used, found = spectral.embeddings((3, 3, 2, 2), (5, 4, 2), 1, conv.explicit_padding((3, 3), "ZERO"))
    assert used.all() and found[0] == ((6, 5), (0, 0)) and found[-1] == ((7, 6), (1, 1))
    used, _ = spectral.embeddings((5, 3, 2, 2), (2, 6, 2), 1, ((4, 0), (1, 1)))
    assert not used.all()
