"""SOC by frequency: against scipy's expm of the dense convolution, the spatial series, and the papers' code."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from tiers import everyday

from lipjax import conv
from lipjax.operators.circular import CircularConv, CircularSeries
from lipjax.parametrize import soc_frequency

pytestmark = pytest.mark.usefixtures("one_blas_thread")

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def skew(seed=0, channels=3, taps=(3, 5), scale=0.3, dtype=jnp.float64):
    raw = np.random.default_rng(seed).normal(size=(*taps, channels, channels)) * scale
    return conv.skew_kernel(jnp.asarray(raw, dtype))


def images(size, channels=3, batch=2, dtype=jnp.float64, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, *size, channels)), dtype)


def dense(apply, size, channels):
    side = size[0] * size[1] * channels
    return np.asarray(jax.jit(apply)(jnp.eye(side).reshape(side, *size, channels))).reshape(side, side).T


@pytest.mark.quick_compiles
@pytest.mark.parametrize(
    ("size", "scale"),
    everyday(itertools.product([(1, 1), (2, 2), (1, 5), (3, 4), (5, 6)], [0.1, 3.0]), ((1, 5), 3.0)),
)
def test_the_response_is_the_exponential_of_the_convolution_whatever_its_norm(size, scale):
    kernel = skew(scale=scale)
    a = dense(lambda x: conv.conv2d(x, kernel, padding="CIRCULAR"), size, 3)
    np.testing.assert_allclose(a, -a.T, atol=1e-12)
    response = soc_frequency.exponential_response(kernel, size)
    assert response.shape == (size[0], size[1] // 2 + 1, 3, 3)
    # The norms are up to 60; expm is accurate to a modest multiple of eps times that.
    found = dense(lambda x: conv.apply_response(response, x), size, 3)
    np.testing.assert_allclose(found, scipy.linalg.expm(a), atol=1e-12)
    unitary = np.einsum("hwji,hwjk->hwik", np.asarray(response).conj(), np.asarray(response))
    np.testing.assert_allclose(unitary, np.broadcast_to(np.eye(3), unitary.shape), atol=1e-13)
    assert 1 <= CircularConv(np.asarray(response), (*size, 3)).bound().proved < 1 + 1e-12


@pytest.mark.quick_compiles
@pytest.mark.parametrize(
    ("num_terms", "out"), everyday(itertools.product([1, 2, 3, 4, 5, 6, 9, 12, 14], [3, 1]), (1, 3), (5, 1), (12, 3))
)
def test_blocks_of_the_series_are_the_series_of_the_convolution(num_terms, out):
    kernel, size = skew(scale=0.5), (4, 5)
    x = images(size)

    @jax.jit
    def both(kernel, x):
        blocks = soc_frequency.exponential_blocks(kernel, size, num_terms, out_channels=out)
        y = CircularConv.from_blocks(*blocks, (*size, 3))(x)
        return y, conv.series_exponential(x, kernel, num_terms=num_terms, padding="CIRCULAR")[..., :out]

    y, expected = both(kernel, x)
    np.testing.assert_allclose(np.asarray(y), np.asarray(expected), atol=1e-11)


def test_the_packed_response_needs_no_transposition_of_a_skew_kernel():
    for size, taps in [((1, 1), (3, 3)), ((4, 4), (3, 3)), ((5, 4), (1, 7)), ((2, 2), (3, 5))]:
        kernel = skew(taps=taps)
        found, expected = soc_frequency.packed_response(kernel, size), conv.packed_response(kernel, size)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-13)
    raw = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 3, 3)))
    found, expected = soc_frequency.packed_response(raw, (4, 4)), conv.packed_response(raw, (4, 4))
    assert float(jnp.abs(found[0] - expected[0]).max()) > 0.1  # control: of others it would be wrong


def forms(raw, x, num_terms, out):
    """The same function in its forms: images of the response, of the series in frequency, of the series in space."""
    kernel, (_, h, w, c) = conv.skew_kernel(raw), x.shape
    m = raw.shape[-1]
    blocks = soc_frequency.exponential_blocks(kernel, (h, w), num_terms, out_channels=out)
    response = CircularConv.from_blocks(blocks[0][..., :c], blocks[1][..., :c], (h, w, c))
    packed = soc_frequency.packed_response(kernel, (h, w))
    terms = 16 if num_terms is None else num_terms
    series = CircularSeries(*packed, (h, w, c), out, terms)
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, m - c)))
    spatial = conv.series_exponential(padded, kernel, num_terms=terms, padding="CIRCULAR")[..., :out]
    return response(x), series(x), spatial


@pytest.mark.quick_compiles
@pytest.mark.parametrize(
    ("num_terms", "size", "out"),
    everyday(
        [(5, (4, 6), 4), (3, (2, 3), 4), (5, (3, 3), 2), (None, (4, 4), 4), (12, (1, 1), 3)],
        (5, (3, 3), 2),
    ),
)
def test_forms_and_their_gradients_agree(num_terms, size, out):
    # The norm stays below 2: sixteen terms are then the exponential to 2^17 / 17! = 4e-10.
    raw = jnp.asarray(np.random.default_rng(2).normal(size=(3, 3, 4, 4)) * 0.2)
    kernel = conv.skew_kernel(raw)
    fixed, paired = (np.asarray(a) for a in conv.packed_response(kernel, size))
    norms = [np.linalg.norm(a, 2) for a in (*fixed, *(paired[:, 0] + 1j * paired[:, 1]))]
    assert 0.5 < max(norms) < 2
    x, g = images(size, 3), images(size, out, seed=3)

    @jax.jit
    def outputs_and_gradients(raw, x):
        found = []
        for index in range(3):
            y, pull = jax.vjp(lambda raw, x, index=index: forms(raw, x, num_terms, out)[index], raw, x)
            found.append((y, *pull(g)))
        return found

    response, series, spatial = outputs_and_gradients(raw, x)
    tolerance = 1e-8 if num_terms is None else 1e-11
    for a, b, c in zip(response, series, spatial, strict=True):
        scale = float(jnp.abs(c).max())
        assert float(jnp.abs(a - c).max()) < tolerance * scale
        assert float(jnp.abs(b - c).max()) < tolerance * scale


@pytest.mark.quick_compiles
@pytest.mark.x64_off
@pytest.mark.parametrize(("size",), everyday([((16, 16),), ((2, 2),)], ((2, 2),)))
def test_forms_agree_to_1e_5_in_single_precision(size):
    raw = jnp.asarray(np.random.default_rng(2).normal(size=(3, 3, 16, 16)) * 0.05, jnp.float32)
    x = images(size, 12, dtype=jnp.float32)
    largest = float(jnp.abs(x).max())
    for num_terms in (5, None):
        found = jax.jit(forms, static_argnums=(2, 3))(raw, x, num_terms, 16)
        assert all(y.dtype == jnp.float32 for y in found)
        for y in found[:2]:
            assert float(jnp.abs(y - found[2]).max()) < 1e-5 * largest


@pytest.mark.quick_compiles
def test_orthogonality_survives_gradient_steps_and_a_zero_kernel_is_the_identity():
    size = (3, 4)
    x, target = images(size), images(size, seed=5)

    def loss(raw):
        blocks = soc_frequency.exponential_blocks(conv.skew_kernel(raw), size)
        return jnp.sum((CircularConv.from_blocks(*blocks, (*size, 3))(x) - target) ** 2)

    raw = jnp.zeros((3, 3, 3, 3))
    step = jax.jit(lambda raw: raw - 0.02 * jax.grad(loss)(raw))
    loss = jax.jit(loss)
    first = float(loss(raw))
    np.testing.assert_allclose(first, float(jnp.sum((x - target) ** 2)), rtol=1e-12)
    for _ in range(20):
        raw = step(raw)
    assert float(loss(raw)) < 0.9 * first  # control: the steps went somewhere
    blocks = soc_frequency.exponential_blocks(conv.skew_kernel(raw), size)
    assert 1 <= CircularConv.from_blocks(*(np.asarray(b) for b in blocks), (*size, 3)).bound().proved < 1 + 1e-13


@pytest.mark.quick_compiles
def test_a_1x1_layer_of_the_papers_code():
    """With 1x1 kernels zero and circular padding agree, and so the golden values hold here."""
    with np.load(GOLDEN / "soc_layer_s1_k1.npz", allow_pickle=False) as z:
        meta = json.loads(str(z["meta"]))
        kernel = jnp.asarray(z["output/kernel"].transpose(2, 3, 1, 0))
        x = jnp.asarray(z["input/x"].transpose(0, 2, 3, 1))
        bias, y = z["param/bias"], z["output/y_eval"].transpose(0, 2, 3, 1)
    m, (_, h, w, c), out = kernel.shape[-1], x.shape, y.shape[-1]
    blocks = soc_frequency.exponential_blocks(kernel, (h, w), 12, out_channels=out)
    found = CircularConv.from_blocks(blocks[0][..., :c], blocks[1][..., :c], (h, w, c))(x)
    np.testing.assert_allclose(np.asarray(found) + bias.reshape(-1), y, rtol=1e-9, atol=1e-12, err_msg=str(meta)[:80])
    series = CircularSeries(*soc_frequency.packed_response(kernel, (h, w)), (h, w, c), out, 12)
    np.testing.assert_allclose(np.asarray(series(x)) + bias.reshape(-1), y, rtol=1e-9, atol=1e-12)
    assert m == max(c, out)


@pytest.mark.x64_off
def test_a_training_step_compiles_to_real_products_only():
    raw, x = jnp.zeros((3, 3, 8, 8), jnp.float32), images((8, 8), 8, dtype=jnp.float32)

    def loss(raw, x):
        blocks = soc_frequency.exponential_blocks(conv.skew_kernel(raw), (8, 8))
        return jnp.sum(CircularConv.from_blocks(*blocks, (8, 8, 8))(x) ** 2)

    text = jax.jit(jax.grad(loss, (0, 1))).lower(raw, x).compile().as_text()
    assert "c64[" not in text and "fft" not in text and "f64[" not in text and "dot(" in text


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="num_terms >= 1"):
        soc_frequency.exponential_blocks(skew(), (4, 4), 0)
    with pytest.raises(ValueError, match="equal channels, at least 4"):
        soc_frequency.exponential_blocks(skew(), (4, 4), 5, out_channels=4)
    with pytest.raises(ValueError, match="equal channels"):
        soc_frequency.exponential_blocks(jnp.zeros((3, 3, 2, 3)), (4, 4))


# (size, channels, in, out): the layers of LipConvnet-5...40 (arXiv:2108.04062), and the form that was fastest at batch
# 128 with 5 terms on two cores; where two were within a tenth, either will do.
LAYERS = [
    ((32, 32), 32, 32, 32, {"response"}),
    ((16, 16), 128, 128, 64, {"response"}),
    ((16, 16), 64, 64, 64, {"response"}),
    ((8, 8), 256, 256, 128, {"response", "series"}),
    ((8, 8), 128, 128, 128, {"response"}),
    ((4, 4), 512, 512, 256, {"series"}),
    ((4, 4), 256, 256, 256, {"series"}),
    ((2, 2), 1024, 1024, 512, {"series"}),
    ((2, 2), 512, 512, 512, {"series"}),
    ((1, 1), 2048, 2048, 1024, {"series"}),
]


@pytest.mark.parametrize(("size", "m", "c_in", "c_out", "best"), LAYERS)
def test_the_cost_model_chooses_what_was_measured_fastest(size, m, c_in, c_out, best):
    form = soc_frequency.choose_form(size, m, c_in, c_out, (3, 3), 128, num_terms=5)
    assert form in best


def test_the_cost_model_follows_batch_terms_promises_and_devices():
    def choose(batch=128, size=(4, 4), c=512, **options):
        return soc_frequency.choose_form(size, c, c, c, (3, 3), batch, **({"num_terms": 5} | options))

    assert choose(batch=4) == "series" and choose(batch=4096) == "response"
    assert choose(num_terms=None) == "response"  # nothing is promised: no series is the exponential
    assert choose(num_terms=None, promised_norm=0.5, batch=16) == "series"
    assert choose(padding="ZERO") == "spatial"
    # Frequencies are spread as images are; but ten of them occupy ten devices at most.
    assert choose(batch=1024) == choose(batch=1024, num_devices=2) == "response"
    assert choose(batch=1024, num_devices=64) == "series"
    with pytest.raises(ValueError, match="'spatial' with a number of terms"):
        choose(padding="ZERO", num_terms=None)
    with pytest.raises(ValueError, match="'ZERO' or 'CIRCULAR'"):
        choose(padding="SAME")
    costs = soc_frequency.form_costs((512, 512), 3, 3, 3, (1, 1), 8, num_terms=1)
    assert min(costs, key=lambda form: costs[form]) == "spatial"  # large maps, little arithmetic per pixel
    assert set(soc_frequency.form_costs((4, 4), 8, 8, 8, (3, 3), 8, num_terms=None)) == {"response"}
