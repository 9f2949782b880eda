"""Losses that ask for margins, against their authors' code (golden files) and their definitions, and at their edges."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiers import everyday

from lipjax import losses
from lipjax.operators import LinearHead

pytestmark = pytest.mark.quick_compiles

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
PARITY = 1e-9  # relative, float64: the golden files' own tolerance


def relative(a, b):
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


def loaded(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: jnp.asarray(file[key]) for key in file if key != "meta"}


def compare(z, name, loss, sign=1.0):
    """The mean of a loss (logits, labels) -> (b,) and its gradient, against those of a golden file."""

    def mean(logits):
        return sign * loss(logits, z["input/labels"]).mean()

    value, gradient = jax.jit(jax.value_and_grad(mean))(z["input/logits"])
    assert relative(value, z[f"output/{name}/loss"]) < PARITY, name
    assert relative(gradient, z[f"output/{name}/grad_logits"]) < PARITY, name


# ---- parity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", everyday(["losses_offset", "losses_offset_k"], "losses_offset_k"))
def test_parity_of_offsets_and_hinges(file):
    z = loaded(file)

    def offset(offset, temperature):
        return lambda y, t: losses.offset_cross_entropy(y, t, offset=offset, temperature=temperature)

    def hinges(margin, power=1.0):
        return lambda y, t: losses.multi_margin(y, t, margin=margin, power=power)

    for i in (0, 1):
        own = offset(float(z[f"input/offset{i}"]), float(z[f"input/temperature{i}"]))
        for name in (f"offset_xent{i}", f"lip_xent{i}"):
            compare(z, name, own)
        if file == "losses_offset":
            compare(z, f"sll_xent{i}", own)
            compare(z, f"sll_xent_margin{i}", lambda y, t, own=own: own(y, t) + hinges(0.7)(y, t))
    compare(z, "lbdn_xent", offset(1.5 * math.sqrt(2), 0.25))
    compare(z, "lbdn_multimargin", hinges(0.5))
    for name, power in (("cpl_margin", 1.0), ("compared_multimargin_p1", 1.0), ("compared_multimargin_p2", 2.0)):
        compare(z, name, hinges(0.7, power))
    if file == "losses_offset":
        compare(z, "margin_boosting", losses.margin_boosting)
    with pytest.raises(AssertionError, match="lbdn_xent"):  # control: another offset is another loss
        compare(z, "lbdn_xent", offset(1.4 * math.sqrt(2), 0.25))


def test_parity_of_kantorovich_rubinstein_and_hinges():
    z = loaded("losses_hkr")
    counts = losses.class_counts(z["input/labels"], 6)
    assert int(counts[5]) == 0  # an absent class
    compare(z, "kr", losses.kantorovich_rubinstein, sign=-1.0)  # theirs is to be maximised
    for margin in (0.5, 1.0):
        compare(z, f"hinge_m{margin}", lambda y, t, m=margin: losses.hinge(y, t, margin=m))
    for alpha, margin in ((0.9, 1.0), (0.5, 0.3), (0.0, 1.0), (1.0, 0.7)):
        own = {"margin": margin, "alpha": alpha}
        compare(z, f"hkr_a{alpha}_m{margin}", lambda y, t, own=own: losses.hkr(y, t, **own, class_counts=counts))
        # Their class stores alpha in float32.
        own["alpha"] = float(np.float32(alpha))
        compare(z, f"lse_hkr_a{alpha}_m{margin}", lambda y, t, own=own: losses.lse_hkr(y, t, **own))
    own = {"margin": 1.0, "alpha": 0.75, "temperature": 2.5, "penalty": 0.5}
    compare(z, "lse_hkr_t", lambda y, t: losses.lse_hkr(y, t, **own))
    for tau in (4.0, 16.0):
        compare(
            z, f"tau_xent{tau}", lambda y, t, t_=tau: losses.offset_cross_entropy(y, t, offset=0.0, temperature=1 / t_)
        )
    with pytest.raises(AssertionError, match="kr"):  # control: means over another batch
        compare(z, "kr", lambda y, t: losses.kantorovich_rubinstein(y, t, class_counts=counts + 1), sign=-1.0)


@pytest.mark.parametrize("i", [0, 1])
def test_parity_of_the_calibrated_loss(i):
    z = loaded("losses_cll")
    setting = {"epsilon": "epsilon", "slack": "p", "shift": "add_epsilon", "weight": "lambda"}
    setting = {name: float(z[f"input/{theirs}{i}"]) for name, theirs in setting.items()}
    setting["two_sided"] = not int(z[f"input/onesided{i}"])

    def mean_loss(logits, weight):
        lipschitz = z[f"input/L{i}"] * LinearHead(weight, jnp.zeros(10)).pairwise_lipschitz()
        return losses.cll(logits, z["input/labels"], lipschitz, **setting).mean()

    value, grads = jax.jit(jax.value_and_grad(mean_loss, (0, 1)))(z["input/logits"], z["param/head.weight"])
    for name in (f"cll{i}", f"cll_soc{i}"):
        assert relative(value, z[f"output/{name}/loss"]) < PARITY
        for got, field in zip(grads, ("grad_logits", "grad_head_weight"), strict=True):
            assert relative(got, z[f"output/{name}/{field}"]) < PARITY
    setting["slack"] *= 1.01  # control
    assert relative(mean_loss(z["input/logits"], z["param/head.weight"]), z[f"output/cll{i}/loss"]) > 1e-4


@pytest.mark.parametrize("i", everyday([0, 1], 1))
def test_parity_of_logit_annealing(i):
    z = loaded("la_losses")
    labels, epsilon = z["input/labels"], float(z[f"input/eps{i}"])
    own = {name: float(z[f"input/{theirs}{i}"]) for name, theirs in (("offset", "offset"), ("power", "gamma"))}
    own["temperature"] = float(z[f"input/temperature{i}"])

    def mean_loss(logits, weight, product):
        lipschitz = (
            product
            * LinearHead(weight / jnp.linalg.norm(weight, axis=1, keepdims=True), jnp.zeros(10)).pairwise_lipschitz()
        )
        return losses.logit_annealing(logits, labels, lipschitz, epsilon, **own).mean()

    arguments = (z["input/logits"], z["param/head.weight"], z[f"input/lc{i}"])
    value, grads = jax.jit(jax.value_and_grad(mean_loss, (0, 1, 2)))(*arguments)
    assert relative(value, z[f"output/emma{i}/loss"]) < PARITY
    for got, field in zip(grads, ("grad_logits", "grad_head_weight", "grad_lc"), strict=True):
        assert relative(got, z[f"output/emma{i}/{field}"]) < PARITY
    ones = jnp.ones((10, 10))
    plain = lambda y, t: losses.logit_annealing(y, t, ones, 0.0, **own)  # noqa: E731
    compare(z, f"plain{i}", plain)
    compare(z, f"noreg{i}", plain)
    compare(z, f"lipconvnet{i}", lambda y, t: plain(y, t) / 4)
    own["power"] += 0.01  # control
    assert relative(mean_loss(*arguments), z[f"output/emma{i}/loss"]) > 1e-4


# ---- what they are -------------------------------------------------------------------------------------------------

LABELS = jnp.array([0, 1, 2])
LOGITS = jnp.array([[2.0, -0.5, 0.25], [0.1, 0.2, 0.3], [1.0, -1.0, 0.5]])
LIPSCHITZ = jnp.array([[0.0, 1.0, 2.0], [1.0, 0.0, 0.5], [2.0, 0.5, 0.0]])


def test_the_scaled_offset_is_the_margin_loss_with_a_temperature():
    got = losses.scaled_offset_cross_entropy(LOGITS, LABELS, LIPSCHITZ, offset=0.3, temperature=1.0)
    np.testing.assert_allclose(got, losses.margin(LOGITS, LABELS, LIPSCHITZ, 0.3), rtol=1e-14)
    # All constants sqrt(2), as of a map whose logits are orthonormal directions: the constant offset, up to its factor.
    same = jnp.full((3, 3), math.sqrt(2))
    got = losses.scaled_offset_cross_entropy(LOGITS, LABELS, same, offset=0.3, temperature=0.25)
    plain = losses.offset_cross_entropy(LOGITS, LABELS, offset=0.3 * math.sqrt(2), temperature=0.25)
    np.testing.assert_allclose(got, plain, rtol=1e-12)
    assert (
        float(
            jnp.abs(losses.margin(LOGITS, LABELS, LIPSCHITZ, 0.4) - losses.margin(LOGITS, LABELS, LIPSCHITZ, 0.3)).min()
        )
        > 0
    )


def test_an_offset_loss_falls_in_the_margin_and_ends_at_zero():
    gaps = jnp.linspace(-4.0, 40.0, 23)
    logits, labels = jnp.stack([gaps, jnp.zeros_like(gaps)], axis=1), jnp.zeros(23, int)
    for loss in (
        losses.offset_cross_entropy(logits, labels, offset=1.0, temperature=0.25),
        losses.logit_annealing(logits, labels, jnp.ones((2, 2)), 0.1, offset=1.0, temperature=0.75, power=5.0),
        losses.cll(logits, labels, jnp.ones((2, 2)), epsilon=0.5, slack=0.1, shift=0.5),
        losses.multi_margin(logits, labels, margin=0.7),
    ):
        assert bool(jnp.all(jnp.diff(loss) <= 0)) and float(loss[0]) > 1.0 and 0 <= float(loss[-1]) < 1e-12


def test_the_calibrated_loss_is_calibrated_and_scale_free():
    """At a radius of epsilon without shift the label's probability is 1 - slack / 2."""
    for epsilon, slack, constant in ((0.15, 0.1, 1.0), (0.5, 0.01, 3.0)):
        logits, lipschitz = jnp.array([[epsilon * constant, 0.0]]), jnp.full((2, 2), constant)
        loss = losses.cll(logits, jnp.array([0]), lipschitz, epsilon=epsilon, slack=slack, shift=0.0)
        assert abs(math.exp(-float(loss[0])) - (1 - slack / 2)) < 1e-14
    own = {"epsilon": 0.2, "slack": 0.1, "shift": 0.2}
    found = losses.cll(LOGITS, LABELS, LIPSCHITZ, **own)
    np.testing.assert_allclose(losses.cll(7 * LOGITS, LABELS, 7 * LIPSCHITZ, **own), found, rtol=1e-13)
    np.testing.assert_allclose(losses.cll(LOGITS, LABELS, LIPSCHITZ, **own, weight=0.5), found + 0.5 * 4, rtol=1e-13)
    assert float(jnp.abs(losses.cll(7 * LOGITS, LABELS, LIPSCHITZ, **own) - found).max()) > 1e-3  # control


def test_logit_annealing_follows_its_formula_in_extremes():
    """Near p = 1 the value is t (1 - p)^(power + 1), far below the rounding error of 1 - p."""
    gap = jnp.array([[50.0, 0.0]])
    loss = losses.logit_annealing(gap, jnp.array([0]), jnp.ones((2, 2)), 0.0, offset=0.0, temperature=1.0, power=2.0)
    assert abs(float(loss[0]) / math.exp(-150.0) - 1) < 1e-12
    wrong = losses.logit_annealing(-gap, jnp.array([0]), jnp.ones((2, 2)), 0.0, offset=2.0, temperature=1.0, power=2.0)
    assert abs(float(wrong[0]) - 52.0) < 1e-12  # cross-entropy


def test_lse_hkr_bounds_the_maximum_from_above():
    y = jnp.array([[0.3, -0.2, 0.1, 0.4], [0.0, 1.0, 1.0, 1.0]])
    labels, margin, penalty = jnp.array([0, 0]), 0.8, 0.5
    label, rivals = y[:, 0], y[:, 1:]
    soft = losses.lse_hkr(y, labels, margin=margin, alpha=0.0, penalty=penalty) + label
    above = soft - rivals.max(axis=1)
    assert bool(jnp.all(above >= 0)) and bool(jnp.all(above <= margin * penalty / 2 + 1e-15))
    assert abs(float(above[1]) - margin * penalty / 2) < 1e-14  # attained where all rivals tie
    two = losses.lse_hkr(y[:, :2], labels, margin=margin, alpha=1.0)  # whose formula divides 0 by 0
    np.testing.assert_allclose(two, jax.nn.relu(0.4 - y[:, 0]) + jax.nn.relu(0.4 + y[:, 1]), rtol=1e-14)


def test_kantorovich_rubinstein_is_the_difference_of_means():
    rng = np.random.default_rng(0)
    y, t = rng.normal(size=(17, 4)), rng.integers(0, 3, 17)  # class 3 is absent
    terms = [(y[t == j, j].mean() if (t == j).any() else 0.0) - y[t != j, j].mean() for j in range(4)]
    loss = losses.kantorovich_rubinstein(jnp.asarray(y), jnp.asarray(t))
    assert abs(float(loss.mean()) + np.mean(terms)) < 1e-14
    one_class = losses.kantorovich_rubinstein(jnp.asarray(y), jnp.full(17, 2))
    assert abs(float(one_class.mean()) - (y[:, [0, 1, 3]].mean(0).sum() - y[:, 2].mean()) / 4) < 1e-14


def test_the_parts_of_a_batch_add_up_with_the_counts_of_the_whole():
    rng = np.random.default_rng(1)
    y, t = jnp.asarray(rng.normal(size=(16, 5))), jnp.asarray(rng.integers(0, 5, 16))
    own = {"margin": 1.0, "alpha": 0.5}

    def in_parts(y, counts):
        return jnp.mean(jnp.stack([losses.hkr(y[i::2], t[i::2], **own, class_counts=counts).mean() for i in (0, 1)]))

    def whole(y):
        return losses.hkr(y, t, **own).mean()

    counts = losses.class_counts(t, 5)
    expected, gradient = jax.jit(jax.value_and_grad(whole))(y)
    found = jax.jit(jax.value_and_grad(in_parts))(y, counts)
    np.testing.assert_allclose(found[0], expected, rtol=1e-13)
    np.testing.assert_allclose(found[1], gradient, rtol=1e-12, atol=1e-15)
    assert abs(float(in_parts(y, None) - expected)) > 1e-3  # control: each part by its own counts
    split = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    sharded = jax.jit(lambda y, t: jax.value_and_grad(lambda y: losses.hkr(y, t, **own).mean())(y))
    value, over = sharded(*(jax.device_put(a, split) for a in (y, t)))
    assert len(over.sharding.device_set) == 8
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    np.testing.assert_allclose(over, gradient, rtol=1e-12, atol=1e-15)


ALL = {
    "offset_cross_entropy": lambda y, t, m: losses.offset_cross_entropy(y, t, offset=1.0, temperature=0.25),
    "scaled": lambda y, t, m: losses.scaled_offset_cross_entropy(y, t, m, offset=1.0, temperature=0.25),
    "annealing": lambda y, t, m: losses.logit_annealing(y, t, m, 0.1, offset=1.0, temperature=0.5, power=5.0),
    "annealing power 1": lambda y, t, m: losses.logit_annealing(y, t, m, 0.1, offset=0.0, temperature=1.0, power=1.0),
    "cll": lambda y, t, m: losses.cll(y, t, m, epsilon=0.1, slack=0.01, shift=0.1, weight=0.1),
    "hkr": lambda y, t, m: losses.hkr(y, t, margin=1.0, alpha=0.5),
    "lse_hkr": lambda y, t, m: losses.lse_hkr(y, t, margin=1.0, alpha=0.5),
    "multi_margin": lambda y, t, m: losses.multi_margin(y, t, margin=1.0),
    "squared hinges": lambda y, t, m: losses.multi_margin(y, t, margin=1.0, power=2.0),
    "margin_boosting": lambda y, t, m: losses.margin_boosting(y, t),
}


@pytest.mark.parametrize("name", ALL)
def test_values_and_gradients_are_finite_at_the_edges(name):
    """Ties, labels of probability 1 and 0, absent classes, heads whose rows coincide, and zeros."""
    labels = jnp.array([0, 0, 0, 0])
    logits = jnp.array([[0.0, 0.0, 0.0], [1e4, 0.0, -1e4], [-1e4, 0.0, 1e4], [1.0, 0.5, 0.0]])

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def total(y, matrix):
        lipschitz = LinearHead(matrix, jnp.zeros(3)).pairwise_lipschitz()
        return ALL[name](y, labels, lipschitz).sum()

    for matrix in (jnp.eye(3), jnp.ones((3, 3)), jnp.zeros((3, 3))):
        value, grads = total(logits, matrix)
        assert np.isfinite(value) and all(np.isfinite(np.asarray(g)).all() for g in grads)
        assert float(jnp.abs(grads[0]).max()) > 0  # control


def test_an_alpha_beyond_one_is_refused():
    """The originals replace it by a / (1 + a) without a word."""
    for loss in (losses.hkr, losses.lse_hkr):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\], and is 10.0: divide it by 1 \+ alpha"):
            loss(LOGITS, LABELS, margin=1.0, alpha=10.0)
