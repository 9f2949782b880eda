"""Whole networks of layers by name and of reflectors against the papers' own code: logits, losses and gradients.

The golden files hold what the original PyTorch code computed in float64 (tests/golden/README.md).
"""

import functools

import golden_helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_helpers import nhwc, relative
from training_helpers import quick_compiles  # noqa: F401

from lipjax import bounds, interop, losses
from lipjax.nn import COLLECTION, potential
from lipjax.parametrize import cpl, sandwich, sll

PARITY = 1e-9


def load(name):
    """The arrays of a golden file, the state dict among them, and the options of its constructor."""
    arrays, meta = golden_helpers.load(name)
    arrays = {
        key: a.astype(float) if a.dtype.kind == "f" else a for key, a in arrays.items()
    }  # some were exact in less
    state = {key.removeprefix("param/"): value for key, value in arrays.items() if key.startswith("param/")}
    return arrays, state, meta["constructor"]


def in_torch_layout(family, state, options, gradients):
    """Gradients by the original's names, in its layout: an entry moves numbers, so where it moves their places to."""
    _, entries = interop._FAMILIES[family](state, dict(options))
    found = {}
    for entry in entries:
        if entry.collection != "params":
            continue
        places = np.arange(np.size(state[entry.name])).reshape(np.shape(state[entry.name]))
        moved = np.asarray(entry.transform(places if entry.part is None else places[entry.part[0]]))
        ours = gradients
        for key in entry.path:
            ours = ours[key]
        whole = found.setdefault(entry.name, np.zeros(places.size))
        whole[moved.ravel()] = np.asarray(ours).ravel()
    return found


def check_gradients(arrays, found, skip=()):
    named = {key.removeprefix("output/grad_norm/") for key in arrays if key.startswith("output/grad_norm/")}
    assert named - set(skip) <= set(found)
    for name in named - set(skip):
        norm = float(arrays[f"output/grad_norm/{name}"])
        assert abs(np.linalg.norm(found[name]) - norm) < PARITY * norm, name
        dotted = float(found[name] @ np.cos(np.arange(found[name].size)))
        assert abs(dotted - arrays[f"output/grad_dotcos/{name}"]) < PARITY * norm, name
        if f"output/grad/{name}" in arrays:
            assert relative(found[name], arrays[f"output/grad/{name}"].ravel()) < PARITY, name


BRONETS = ("net_bronet_bro", "net_bronet_cholesky", "net_bronet_v2")


@pytest.mark.nightly
@pytest.mark.parametrize("name", BRONETS)
def test_logits_of_bronet(name):
    arrays, state, options = load(name)
    model, variables = interop.from_torch("bronet", state, **options)
    assert relative(jax.jit(model.apply)(variables, nhwc(arrays["input/x"])), arrays["output/logits_eval"]) < PARITY


@pytest.mark.nightly
@pytest.mark.parametrize("name", BRONETS)
def test_a_training_step_of_bronet(name):
    arrays, state, options = load(name)
    model, variables = interop.from_torch("bronet", state, **options)
    x, labels = nhwc(arrays["input/x"]), jnp.asarray(arrays["input/labels"])
    vectors = {"stem/linear": nhwc(arrays["input/train_init_x/stem.0.init_x"])[0]}
    if "input/train_init_x/conv_1.init_x" in arrays:
        vectors["residual_01/linear"] = nhwc(arrays["input/train_init_x/conv_1.init_x"])[0]

    @jax.jit
    def step(params):
        def loss(params):
            held = {**variables, "params": params}
            network, _ = model.apply(held, True, method="build", mutable=[COLLECTION])
            features, means = network.features_and_means(x)
            product, _ = bounds.feature_lipschitz_estimate(network, vectors, options["num_lc_iter"])
            constants = product * network.head.pairwise_lipschitz()
            fixed = {"offset": 2.0, "temperature": 0.75, "power": 5.0}
            value = losses.logit_annealing(network.head(features), labels, constants, 36 / 255, **fixed).mean()
            return value, (product, means)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, (product, means)), gradients = step(variables["params"])
    assert relative(product, arrays["output/sub_lipschitz_train"]) < PARITY
    assert relative(value, arrays["output/loss_train"]) < PARITY
    stacks = [("conv", "block")] + [("conv_1", "residual")] * ("output/after/conv_1.running_mean" in arrays)
    for there, here in stacks:
        after = arrays[f"output/after/{there}.running_mean"]
        of_batch = [means[next(n for n in means if n.startswith(f"{here}_{i + 1:02d}/"))] for i in range(len(after))]
        assert relative(0.9 * state[f"{there}.running_mean"] + 0.1 * np.asarray(of_batch), after) < PARITY
    check_gradients(arrays, in_torch_layout("bronet", state, options, gradients))


@pytest.mark.nightly
def test_the_network_of_the_comparison():
    arrays, state, options = load("net_compared_aol")
    model, variables = interop.from_torch("compared", state, **options)
    x, labels = nhwc(arrays["input/x"]), jnp.asarray(arrays["input/labels"])
    assert relative(jax.jit(model.apply)(variables, x), arrays["output/logits"]) < PARITY

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits = model.apply({**variables, "params": params}, x, train=True)
        return losses.cross_entropy(logits, labels).mean()

    value, gradients = loss(variables["params"])
    assert relative(value, arrays["output/loss_train"]) < PARITY
    check_gradients(arrays, in_torch_layout("compared", state, options, gradients))


run = jax.jit(lambda op, x: op(x))


def zero_padded(kernel, side):
    """The matrix of a convolution (o, i, k, k) of images (i, side, side) with zeros around."""
    o, i, k, _ = kernel.shape
    unit, r = np.eye(i * side * side).reshape(-1, i, side, side), k // 2
    x = np.pad(unit, ((0, 0), (0, 0), (r, r), (r, r)))
    moved = {(a, b): x[:, :, a : a + side, b : b + side] for a, b in np.ndindex(k, k)}
    y = sum(np.einsum("oi,niyx->noyx", kernel[:, :, a, b], m) for (a, b), m in moved.items())
    return y.reshape(len(unit), -1).T


def row_sums(kernel, q):
    """Sums over hidden channels j of |taps of the autocorrelation of rows i and j|, times q_j / q_i."""
    k, sums = kernel.shape[-1], np.zeros(len(kernel))
    wide = np.pad(kernel, ((0, 0), (0, 0), (k - 1, k - 1), (k - 1, k - 1)))
    for a, b in np.ndindex(2 * k - 1, 2 * k - 1):
        sums += np.abs(np.einsum("ictu,jctu->ij", kernel, wide[:, :, a : a + k, b : b + k])) @ q / q
    return sums


@pytest.mark.parametrize("kind", ["SLLConv2d", pytest.param("CPLConv2d", marks=pytest.mark.nightly)])
def test_residual_layers_in_the_network_of_the_comparison(kind, monkeypatch):
    """Layer by layer, against the original's definition in NumPy; the rest of the network is that of AOL's test."""
    rng, epsilon, factors = np.random.default_rng(3), 1e-6, {}
    layers = {"FirstConv": (4, 1, 4), "Block1.0": (4, 3, 4), "Block2.0": (8, 1, 2), "ClassificationHead.0": (16, 1, 1)}
    ours = dict(zip(layers, ("first", "block1_conv0", "block2_conv0", "last"), strict=True))
    state, matrices, sigmas = {}, {}, {}
    for name, (c, k, side) in layers.items():
        kernel = rng.normal(size=(c, c, k, k))
        state |= {f"{name}.kernel": kernel, f"{name}.bias": rng.normal(size=c)}
        matrices[name] = zero_padded(kernel, side)
        sigmas[ours[name]] = np.linalg.norm(matrices[name], 2)
        if kind == "SLLConv2d":
            state[f"{name}.q"] = rng.normal(size=c)
            factors[name] = 2 / (row_sums(kernel, np.abs(state[f"{name}.q"]) + epsilon) + epsilon)
        else:
            state[f"{name}.u"] = rng.normal(size=(1, c, side, side))
            factors[name] = np.full(c, 2 / (sigmas[ours[name]] ** 2 + epsilon))
    options = {"base_width": 4, "nrof_blocks": 2, "nrof_layers_per_block": 1, "nrof_classes": 3, "get_conv": kind}
    model, variables = interop.from_torch("compared", state, **options)
    monkeypatch.setattr(sll, "conv", functools.partial(sll.conv, room=1.0))
    monkeypatch.setattr(cpl, "contracted", functools.partial(cpl.contracted, room=1.0))
    monkeypatch.setattr(potential, "_sigma", lambda module, *rest: jnp.asarray(sigmas[module.name]))
    network = jax.jit(lambda v: model.apply(v, method="build"))(variables)
    steps = {
        name.split("/")[0]: op for name, op in zip(network.names, network.ops, strict=True) if name.endswith("/step")
    }
    for name, (c, _, side) in layers.items():
        x = rng.normal(size=(c, side, side))
        bias, factor = (np.repeat(a, side * side) for a in (state[f"{name}.bias"], factors[name]))
        hidden = np.maximum(matrices[name] @ x.ravel() + bias, 0)
        theirs = x - (matrices[name].T @ (factor * hidden)).reshape(x.shape)
        # Where pairs of neighbours are sorted, ours are those of even number and then those of odd.
        order = np.arange(c) if name == "ClassificationHead.0" else np.r_[0:c:2, 1:c:2]
        assert relative(run(steps[ours[name]], nhwc(x[order][None]))[0], np.moveaxis(theirs[order], 0, -1)) < PARITY


def test_the_network_of_sdp_based_layers(monkeypatch):
    arrays, state, options = load("net_sll")
    model, variables = interop.from_torch("sll", state, **options)
    x, labels = nhwc(arrays["input/x"]), jnp.asarray(arrays["input/labels"])
    # What our layers leave below 1 is a factor of 1 - 2^-26 in each of five.
    assert PARITY < relative(jax.jit(model.apply)(variables, x), arrays["output/logits"]) < 5 * 2 * 2.0**-26
    for name in ("dense", "conv"):
        monkeypatch.setattr(sll, name, functools.partial(getattr(sll, name), room=1.0))

    @jax.jit
    def loss(params):
        logits = model.apply({**variables, "params": params}, x, train=True)
        return losses.cross_entropy(logits, labels).mean(), logits

    (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    assert relative(logits, arrays["output/logits"]) < PARITY
    assert relative(value, arrays["output/loss_train"]) < PARITY
    # q of their convolutions has no effect, so that its gradient is rounding alone: ours has weights that act.
    inert = [f"model.{i}.q" for i in (1, 2, 3)]
    assert all(arrays[f"output/grad_norm/{name}"] < 1e-15 for name in inert)
    check_gradients(arrays, in_torch_layout("sll", state, options, gradients), skip=inert)


@pytest.mark.nightly
def test_the_network_of_convex_potential_layers(monkeypatch):
    """With the norms that the original's evaluation uses: ours are estimated on another grid, until they converge."""
    arrays, state, options = load("net_cpl")
    model, variables = interop.from_torch("cpl", state, **options)
    x, sigma = nhwc(arrays["input/x"]), {}
    for here, there, first in (("conv", "stable_block", 1), ("dense", "layers_linear", 0)):
        for i in range(3 - (here == "dense")):
            sigma[f"{here}_{i + 1:02d}"] = arrays[f"output/sigma_eval/{there}.{i + 1 - first}.eval_sv_max"][0]
    ours = jax.jit(lambda v: model.apply(v, method="build"))(variables)
    monkeypatch.setattr(cpl, "contracted", functools.partial(cpl.contracted, room=1.0))
    monkeypatch.setattr(potential, "_sigma", lambda module, *rest: jnp.asarray(sigma[module.name]))
    theirs = jax.jit(lambda v: model.apply(v, method="build"))(variables)
    assert relative(run(theirs, x), arrays["output/logits_eval"]) < PARITY
    # Theirs are low, and their layers not contractive; ours are.
    products = [
        float(np.prod([row.claimed for row in bounds.operator_bounds(jax.tree.map(np.asarray, network))]))
        for network in (theirs, ours)
    ]
    assert products[0] > 1.001 and products[1] <= 1 + 1e-6


def cayley_of_wide(w):
    """[A B] with orthonormal rows, as the original writes it: for complex matrices transposed, not conjugated."""
    o, w = len(w), w.T
    u, v, eye = w[:o], w[o:], np.eye(len(w[0]))
    inverse = np.linalg.inv(eye + u - u.conj().T + v.conj().T @ v)
    z = u - u.conj().T + v.conj().T @ v
    return np.concatenate([inverse @ (eye - z), -2 * v @ inverse]).T


def sandwich_convolution(x, weight, bias, psi, alpha, strided):
    """The original's layer on an image (c, n, n), frequency by frequency."""
    if strided:
        c, n, _ = x.shape
        x = x.reshape(c, n // 2, 2, n // 2, 2).transpose(0, 2, 4, 1, 3).reshape(4 * c, n // 2, n // 2)
    o, _, k, _ = weight.shape
    n = x.shape[1]
    away = np.arange(k) - (k - 1) // 2
    waves = np.exp(2j * np.pi * np.arange(n)[:, None] * away / n)
    symbols = np.einsum("oiab,fa,gb->fgoi", weight, waves, waves)
    symbols *= alpha / np.linalg.norm(symbols[:, : n // 2 + 1])
    stacked = np.array([[cayley_of_wide(w) for w in row] for row in symbols])
    first, second = stacked[..., :o], stacked[..., o:]
    hidden = np.einsum("fgoi,ifg->ofg", second, np.fft.fft2(x))
    hidden = np.fft.ifft2(2**0.5 * np.exp(-psi)[:, None, None] * hidden).real + bias[:, None, None]
    hidden = np.exp(psi)[:, None, None] * np.fft.fft2(np.maximum(hidden, 0))
    return np.fft.ifft2(2**0.5 * np.einsum("fgoi,ofg->ifg", first.conj(), hidden)).real


@pytest.mark.nightly
def test_the_network_of_sandwiches(monkeypatch):
    """Against the original's definition in NumPy: its own sizes, which are fixed, are too large to compare."""
    rng, o, dense, classes = np.random.default_rng(0), 4, 6, 3
    shapes = [(o, o + 2, 3, 3), (o, o + 4 * o, 1, 1), (dense, dense + 4 * o)]
    state = {}
    for i, shape in zip((0, 1, 3), shapes, strict=True):
        state[f"model.{i}.weight"] = rng.normal(size=shape)
        state |= {f"model.{i}.{name}": rng.normal(size=shape[0]) / 2 for name in ("bias", "psi")}
        state[f"model.{i}.alpha"] = np.array(rng.uniform(2, 4))
    state |= {"model.4.weight": rng.normal(size=(classes, dense)), "model.4.bias": rng.normal(size=classes)}
    options = {"img_size": 4, "in_channels": 2, "num_classes": classes, "widths": (o,), "dense_widths": (dense,)}
    model, variables = interop.from_torch("lbdn", state, **options)
    image = rng.normal(size=(2, 4, 4))
    x = image
    for i in (0, 1):
        x = sandwich_convolution(x, *(state[f"model.{i}.{n}"] for n in ("weight", "bias", "psi", "alpha")), i == 1)
    weight, psi = state["model.3.weight"], state["model.3.psi"]
    stacked = cayley_of_wide(state["model.3.alpha"] * weight / np.linalg.norm(weight))
    hidden = 2**0.5 * np.exp(-psi) * (stacked[:, dense:] @ x.ravel()) + state["model.3.bias"]
    x = 2**0.5 * stacked[:, :dense].T @ (np.exp(psi) * np.maximum(hidden, 0))
    rows = state["model.4.weight"] / np.linalg.norm(state["model.4.weight"], axis=1, keepdims=True)
    for name in ("dense", "blocks", "bias"):  # without the room that ours leave below 1
        monkeypatch.setattr(sandwich, name, functools.partial(getattr(sandwich, name), room=1.0))
    ours = jax.jit(lambda v, x: model.apply(v, x))(variables, nhwc(image[None]))[0]
    assert relative(ours, rows @ x + state["model.4.bias"]) < PARITY
    with pytest.raises(ValueError, match="gamma: expected 1"):
        interop.from_torch("lbdn", state, gamma=2.0, **options)


def test_gradients_of_another_layout_are_noticed():
    """A control for `in_torch_layout`: kernels that are not turned over give another gradient."""
    arrays, state, options = load("net_bronet_cholesky")
    _, entries = interop._FAMILIES["bronet"](state, dict(options))
    entry = next(entry for entry in entries if entry.name == "conv.weights")
    places = np.arange(np.size(state[entry.name])).reshape(np.shape(state[entry.name]))[0]
    upright = np.transpose(places, (2, 3, 1, 0))
    assert (np.asarray(entry.transform(places)) != upright).any()
    assert (np.asarray(entry.transform(places)) == np.flip(upright, (0, 1))).all()
