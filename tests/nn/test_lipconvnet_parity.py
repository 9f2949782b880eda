"""LipConvnets against the papers' own code: logits, features' certificates and gradients, from its weights.

The golden files hold what the original PyTorch code computed in float64 (tests/golden/README.md).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from golden_helpers import GOLDEN, load, relative
from tiers import everyday
from training_helpers import quick_compiles  # noqa: F401

from lipjax import bounds, certify, interop, losses
from lipjax.nn import COLLECTION

PARITY = 1e-9
FILES = sorted(path.stem for path in GOLDEN.glob("lipconvnet_*.npz"))
# Those of every run; Cayley layers: tests/theory/test_parametrize_cayley.py. Nightly adds theirs, two blocks (0.5 MB a
# file instead of 0.85), and every activation with every head.
ALWAYS = {
    "lipconvnet_crc_b1_maxmin_lip1",
    "lipconvnet_soc_b1_maxmin_lln",
}


def cases(names):
    return [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.nightly) for name in names]


def imported(name):
    arrays, meta = load(name)
    state = {key.removeprefix("param/"): value for key, value in arrays.items() if key.startswith("param/")}
    family = "improved_l2" if "_crc_" in name else "soc"
    model, variables = interop.from_torch(family, state, **meta["constructor"])
    return arrays, model, variables, jnp.asarray(np.transpose(arrays["input/x"], (0, 2, 3, 1)))


def to_torch_layout(array):
    """Kernels HWIO -> OIHW; the rest has the layout of the original."""
    return np.transpose(array, (3, 2, 0, 1)) if np.ndim(array) == 4 else np.asarray(array)


def torch_name(name, path):
    """The original's name of one of our parameters."""
    module, *rest = path
    leaf = rest[-1]
    if "_crc_" in name:
        prefix = {"stem": "init_layer", "head": "logits_layer"}.get(module, module.replace("_conv", "."))
        renamed = {"kernel": "ortho.weight", "bias": "ortho.bias", "w1": "linear1.weight", "b1": "linear1.bias"}
        renamed |= {"w2": "linear2.weight", "b2": "linear2.bias"}
        return f"{prefix}.{renamed.get(leaf, f'act.{leaf}')}"
    kernel = "weight" if "cayley" in name else "random_conv_filter"
    if module == "head":
        return f"last_layer.{ {'matrix': 'weight', 'kernel': kernel}.get(leaf, leaf) }"
    prefix = module.replace("block", "layer").replace("_conv", ".")
    if leaf.startswith("theta"):
        return f"{prefix}.activation.{leaf}"
    return f"{prefix}.conv.{ {'kernel': kernel}.get(leaf, leaf) }"


def test_all_files_are_here():
    assert len(FILES) == 16 and ALWAYS < set(FILES)


@functools.cache
def evaluated(name):
    """The golden arrays, the network and its logits."""
    arrays, model, variables, x = imported(name)

    @jax.jit
    def run(variables, x):
        network = model.apply(variables, method="build")
        return network, network(x)

    return arrays, *run(variables, x)


@pytest.mark.parametrize("name", cases(FILES))
def test_logits(name):
    arrays, _, logits = evaluated(name)
    assert relative(logits, arrays["output/logits" if "_crc_" in name else "output/logits_eval"]) < PARITY


# Gradients through the layers of the others: tests/theory/test_parametrize_cayley.py and test_parametrize_soc.py.
@pytest.mark.parametrize("name", everyday(FILES, "lipconvnet_soc_b1_maxmin_lln"))
def test_gradients(name):
    arrays, model, variables, x = imported(name)
    labels = jnp.asarray(arrays["input/labels"])

    @jax.jit
    @jax.value_and_grad
    def loss(params_and_x):
        params, pixels = params_and_x
        found = model.apply({**variables, "params": params}, pixels, train=True)
        return losses.cross_entropy(found, labels).mean()

    value, (grads, grad_x) = loss((variables["params"], x))
    if "output/loss_train" in arrays:
        assert abs(float(value) - arrays["output/loss_train"]) < PARITY * abs(float(value))
    assert relative(np.transpose(grad_x, (0, 3, 1, 2)), arrays["output/grad_x_train"]) < PARITY
    seen = 0
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        there = torch_name(name, [key.key for key in path])
        if name == "lipconvnet_cayley_b2_maxmin_ortho" and there == "layer5.0.conv.weight":
            # The original crops the 3x3 kernel to its 2x2 map; here the taps that it loses are zero, but they act.
            assert float(jnp.abs(grad[2:]).max()) > 0
            grad = grad.at[2:].set(0).at[:, 2:].set(0)
        grad = to_torch_layout(grad)
        seen += 1
        norm = arrays[f"output/grad_norm/{there}"]
        assert abs(np.linalg.norm(grad) - norm) < PARITY * norm, there
        flat = grad.ravel()
        dotted = float(flat @ np.cos(np.arange(flat.size)))
        assert abs(dotted - arrays[f"output/grad_dotcos/{there}"]) < PARITY * norm, there
        if f"output/grad/{there}" in arrays:
            assert relative(flat, arrays[f"output/grad/{there}"].ravel()) < PARITY, there
    assert seen == sum(key.startswith("output/grad_norm/") for key in arrays)


@pytest.mark.parametrize("name", cases(name for name in FILES if "_crc_" not in name))
def test_certificates_of_the_first_paper(name):
    arrays, network, logits = evaluated(name)
    # The original divides by 1 / max(std), which is right where, as here, all are equal.
    lipschitz = float(arrays["input/L"]) * network.head.pairwise_lipschitz()
    ours = np.asarray(certify.certified_radius(logits, lipschitz))
    theirs = arrays["output/cert_pred"]
    if name.endswith("_lln"):
        assert relative(ours, theirs) < PARITY
    else:
        # The original takes sqrt(2) for the distance of two rows. Rows of a truncated exponential are a little shorter
        # (Cayley's are exact), and our distances are those of the rows that are used.
        assert (np.abs(ours - theirs) <= (1e-9 if "cayley" in name else 1e-3) * np.abs(theirs) + 1e-12).all()


@pytest.mark.parametrize("name", cases(["lipconvnet_soc_b1_maxmin_lln", "lipconvnet_soc_b2_hh2_lln"]))
def test_the_normalisation_is_the_originals(name):
    """sigma of every layer, through the norm of the normalised kernel."""
    arrays, network, _ = evaluated(name)
    kernels = {n: op.kernel for n, op in zip(network.names, network.ops, strict=True) if n.endswith("/linear")}
    assert len(kernels) == sum(key.startswith("output/sigma/") for key in arrays)
    for layer, kernel in kernels.items():
        block, i = layer.split("/")[0].removeprefix("block").split("_conv")
        prefix = f"layer{block}.{i}.conv"
        raw = np.transpose(arrays[f"param/{prefix}.random_conv_filter"], (2, 3, 1, 0))
        skew = (raw - np.flip(raw, (0, 1)).swapaxes(2, 3)) / 2
        theirs = arrays[f"output/sigma/{prefix}"]
        if raw.shape[0] == 1:  # the exponential itself, of a matrix of norm 1
            wanted = scipy.linalg.expm(skew[0, 0] / theirs)[: kernel.shape[2], : kernel.shape[3]]
            np.testing.assert_allclose(kernel[0, 0], wanted, atol=1e-9)  # 12 terms
        else:
            sigma = 0.7 * np.linalg.norm(skew) / np.linalg.norm(np.asarray(kernel))
            assert abs(sigma - theirs) < PARITY * sigma


def state_dict(name="lipconvnet_soc_b1_maxmin_lln"):
    arrays, meta = load(name)
    state = {key.removeprefix("param/"): value for key, value in arrays.items() if key.startswith("param/")}
    return state, meta["constructor"]


def test_a_state_dict_that_does_not_fit_is_refused_by_name():
    state, options = state_dict()
    with pytest.raises(ValueError, match=r"lacks \['layer1.0.conv.bias'\]"):
        interop.from_torch("soc", {k: v for k, v in state.items() if k != "layer1.0.conv.bias"}, **options)
    with pytest.raises(ValueError, match=r"extra \['layer9.weight'\]"):
        interop.from_torch("soc", {**state, "layer9.weight": np.zeros(3)}, **options)
    wrong = {**state, "layer1.0.conv.random_conv_filter": np.zeros((12, 11, 3, 3))}
    with pytest.raises(ValueError, match=r"layer1.0.conv.random_conv_filter: .*\(12, 12, 3, 3\).*\(12, 11, 3, 3\)"):
        interop.from_torch("soc", wrong, **options)
    with pytest.raises(ValueError, match="family of .*'sock'"):
        interop.from_torch("sock", state, **options)
    with pytest.raises(ValueError, match="options .*got .*'depth'"):
        interop.from_torch("soc", state, depth=5, **options)
    with pytest.raises(ValueError, match="correction"):
        interop.from_torch("soc", {**state, "layer1.0.conv.correction": np.array([0.9])}, **options)


def test_an_imported_network_trains_on():
    """The imported variables have the structure of fresh ones."""
    state, options = state_dict()
    model, variables = interop.from_torch("soc", state, **options)
    fresh = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *model.input_shape)))
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, fresh["params"])
    assert jax.tree.structure(variables[COLLECTION]) == jax.tree.structure(fresh[COLLECTION])
    estimated = bounds.init_vectors(model.apply(variables, method="build"), jax.random.key(0))
    assert set(estimated) == {"block5_conv0/linear"}  # of one tap: an ordinary convolution, outside of training
