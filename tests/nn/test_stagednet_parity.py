"""The staged network of adaptive orthogonal convolutions: weights of orthogonium, against kernels of its own code.

The golden files hold single layers of the original in float64 (tests/golden/README.md); NumPy puts them together.
"""

import golden_helpers
import jax
import numpy as np
import pytest
from golden_helpers import nhwc, relative
from training_helpers import quick_compiles  # noqa: F401

from lipjax import interop
from lipjax.nn import COLLECTION

PARITY = 1e-9


def circular(x, kernel, strides):
    """A convolution (o, i, 3, 3) of an image (c, n, n) whose first output has its centre at pixel 0."""
    n, out = x.shape[1], 0
    for a, b in np.ndindex(3, 3):
        moved = np.roll(x, (1 - a, 1 - b), (1, 2))[:, :n:strides, :n:strides]
        out = out + np.einsum("oi,iyx->oyx", kernel[:, :, a, b], moved)
    return out


def bjorck_of(x, u, v, steps=3):
    """The original's dense matrix: power iteration from the vectors of the state, then twelve of Björck's steps."""

    def unit(z):
        return z / (np.linalg.norm(z) + 1e-8)

    for _ in range(steps):
        v = unit(x.T @ unit(u))
        u = unit(x @ unit(v))
    x = x / (unit(u) @ x @ unit(v) + 1e-6)
    for _ in range(12):
        x = 1.5 * x - 0.5 * x @ x.T @ x
    return x


def halves_sorted(x):
    a, b = np.split(x, 2)
    return np.concatenate([np.maximum(a, b), np.minimum(a, b)])


@pytest.fixture(scope="module")
def staged():
    """A network put together of the golden layers: two convolutions, a dense layer by its definition, and the head."""
    rng = np.random.default_rng(1)
    layers = {0: "aoc_zeros", 3: "aoc_s2_k3", 10: "ortho_linear_default_up"}
    golden = {place: golden_helpers.load(name)[0] for place, name in layers.items()}
    state = {
        f"{place}.{key.removeprefix('param/')}": value
        for place, arrays in golden.items()
        for key, value in arrays.items()
        if key.startswith("param/")
    }
    hidden = "7.parametrizations.weight"
    state[f"{hidden}.original"] = rng.normal(size=(6, 8 * 2 * 2))
    for side, size in (("u", 6), ("v", 8 * 2 * 2)):
        state[f"{hidden}.0.parametrizations.{side}.original"] = rng.normal(size=(size, 1))
    state["7.bias"] = rng.normal(size=6)
    options = {"img_shape": (4, 4, 4), "dim_repeats": [(4, 1), (8, 0)], "dim_nb_dense": (6, 1), "n_classes": 9}
    return state, options, golden, rng.normal(size=(2, 4, 4, 4))


def staged_logits(state, golden, image, norms=lambda place, y: y, head=None):
    """The logits in NumPy, from the kernels of the golden files. norms: what stands behind the layer of a place."""

    def bias(place, y):
        own = state.get(f"{place}.bias", np.zeros(len(y)))
        return halves_sorted(norms(place + 1, y + own.reshape(-1, *[1] * (y.ndim - 1))))

    x = bias(0, circular(image, golden[0]["output/kernel"], 1))
    x = bias(3, circular(x, golden[3]["output/kernel"], 2))
    weight = "7.parametrizations.weight"
    sides = (state[f"{weight}.0.parametrizations.{side}.original"][:, 0] for side in "uv")
    x = bias(7, bjorck_of(state[f"{weight}.original"], *sides) @ x.ravel())
    return (golden[10]["output/W"] if head is None else head) @ x + state["10.bias"]


@pytest.mark.nightly
def test_the_network_of_adaptive_orthogonal_convolutions(staged):
    state, options, golden, images = staged
    model, variables = interop.from_torch("orthogonium", state, **options)

    @jax.jit
    def first_pass(variables, x):  # in which the original advances its vectors, in either mode; ours when it trains
        network, changed = model.apply(variables, True, method="build", mutable=[COLLECTION])
        return network, network(x), changed[COLLECTION]

    network, logits, after = first_pass(variables, nhwc(images))
    ops = dict(zip(network.names, network.ops, strict=True))
    for place, name in ((0, "stage1_conv1"), (3, "stage2_down")):
        kernel = ops[f"{name}/linear"].map.kernel
        assert relative(kernel, golden_helpers.hwio(golden[place]["output/kernel"])) < PARITY
        for key, value in golden[place].items():
            parts = key.split(".")
            if key.startswith("output/after/"):
                array = "patch" if ".pi." in key else "columns"
                moved = after[name]["vectors"][array][parts[-2]]
                assert np.abs(moved - value[0, ..., 0]).max() < PARITY
                start = variables[COLLECTION][name]["vectors"][array][parts[-2]]
                assert np.array_equal(start, state[f"{place}.{key.removeprefix('output/after/')}"][0, ..., 0])
    assert relative(network.head.matrix, golden[10]["output/W"]) < PARITY
    theirs = np.stack([staged_logits(state, golden, image) for image in images])
    assert relative(logits, theirs) < PARITY


@pytest.mark.nightly
def test_centred_networks_of_adaptive_orthogonal_convolutions(staged):
    """The published configurations: convolutions without biases, a batch's means subtracted behind every layer."""
    state, options, golden, images = staged
    rng = np.random.default_rng(2)
    state = {name: a for name, a in state.items() if name not in ("0.bias", "3.bias")}
    for place, size in ((1, 4), (4, 8), (8, 6)):
        state[f"{place}.running_mean"], state[f"{place}.bias"] = rng.normal(size=(2, size))
        state[f"{place}.running_num_batches"] = np.array([float(place)])
    weight = "10.parametrizations.weight"
    free = rng.normal(size=(9, 6))
    state = {name: a for name, a in state.items() if not name.startswith(weight)} | {f"{weight}.original": free}
    options = {**options, "norm": "BatchCentering", "last_layer_type": "classwise"}
    model, variables = interop.from_torch("orthogonium", state, **options)

    def norms(place, y):
        mean = state[f"{place}.running_mean"] / state[f"{place}.running_num_batches"]
        return y + (state[f"{place}.bias"] - mean).reshape(-1, *[1] * (y.ndim - 1))

    rows = free / np.linalg.norm(free, axis=1, keepdims=True)
    theirs = np.stack([staged_logits(state, golden, image, norms, rows) for image in images])

    @jax.jit
    def second_pass(variables, x):
        _, changed = model.apply(variables, True, method="build", mutable=[COLLECTION])
        return model.apply({**variables, COLLECTION: {**variables[COLLECTION], **changed[COLLECTION]}}, x)

    assert relative(second_pass(variables, nhwc(images)), theirs) < PARITY
    with pytest.raises(ValueError, match="norm: expected None or 'BatchCentering'"):
        interop.from_torch("orthogonium", state, **{**options, "norm": "BatchLipNorm"})


def test_biases_that_the_original_does_not_have_are_zero(staged):
    state, options, *_ = staged
    state = {name: a for name, a in state.items() if name not in ("0.bias", "3.bias")}
    _, variables = interop.from_torch("orthogonium", state, **options)
    assert not np.any(variables["params"]["stage1_conv1"]["bias"])
    assert np.array_equal(variables["params"]["dense_01"]["bias"], state["7.bias"])
    with pytest.raises(ValueError, match=r"lacks \['3.parametrizations.weight_1.original'\]"):
        interop.from_torch(
            "orthogonium", {n: a for n, a in state.items() if "3.param" not in n or "_1.o" not in n}, **options
        )
