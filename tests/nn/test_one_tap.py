"""Kernels of one tap: the function that frequencies give, computed by one matrix on the channels of each pixel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import everyday

from lipjax import operators
from lipjax.nn import SOC, BROConv, BROResidual, Cayley, LOTConv, SandwichConv
from lipjax.parametrize import cayley

SHAPE = (3, 4, 4)
BY_FREQUENCIES = operators.CircularConv | operators.ConvExponential
LAYERS = {
    "soc": SOC(6, 1, scale=1.0, batch_size=2),
    "soc, fewer channels": SOC(2, 1, scale=1.0, batch_size=2),
    "soc, exact": SOC(6, 1, scale=1.0, batch_size=2, padding="CIRCULAR", train_terms=None, eval_terms=None),
    "cayley": Cayley(6, 1),
    "cayley, strided": Cayley(6, 3, 2),
    "bro": BROConv(6, 1),
    "lot": LOTConv(6, 1),
    "bro residual": BROResidual(2, 1),
    "lot residual": BROResidual(2, 1, method="lot", centering=False),
    "sandwich": SandwichConv(6, 1),
}


def by_frequencies(blocks, kernel_size, in_shape, *, nonexpansive=False, train=False):
    del kernel_size, train
    return operators.CircularConv.from_blocks(*blocks(in_shape[:2]), in_shape, nonexpansive)


def parts(ops):
    return [part for op in ops for part in (op, getattr(op, "linear", None), getattr(op, "map", None))]


def function(module, shape, x):
    """(A sum of what the layer gives in a training step, what it gives), and the gradient, of its variables."""

    def run(params, state):
        ops, _ = module.apply({"params": params, **state}, shape, True, mutable=list(state))
        y = functools.reduce(lambda y, op: op[1](y), ops, x)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(run, has_aux=True))


@pytest.mark.parametrize("name", everyday(LAYERS, "cayley, strided"))
def test_one_matrix_is_the_function_of_all_frequencies(name, monkeypatch):
    module, shape = LAYERS[name], (4, 6, 4) if "strided" in name else SHAPE
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape)))
    state = dict(module.init(jax.random.key(0), shape))
    params = jax.tree.map(lambda a: a + 0.1 * jnp.sin(jnp.arange(a.size)).reshape(a.shape), state.pop("params"))
    contracted = not isinstance(module, SandwichConv)  # whose own promise it is
    for train in (True, False):
        ops = [op for _, op in module.apply({"params": params, **state}, shape, train, mutable=list(state))[0]]
        assert any(isinstance(part, operators.Conv) for part in parts(ops))
        assert not any(isinstance(part, BY_FREQUENCIES) for part in parts(ops))
        assert any(isinstance(part, operators.Contraction) for part in parts(ops)) == (train and contracted)
    (_, found), gradient = function(module, shape, x)(params, state)
    with monkeypatch.context() as patch:
        patch.setattr(operators, "conv_of_blocks", by_frequencies)
        other = module.clone(form="spatial") if isinstance(module, SOC) and module.padding == "ZERO" else module
        ops = [op for _, op in other.apply({"params": params, **state}, shape, True, mutable=list(state))[0]]
        assert any(isinstance(part, BY_FREQUENCIES) for part in parts(ops))  # control
        (_, wanted), its_gradient = function(other, shape, x)(params, state)
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), gradient, its_gradient)


def test_the_approximate_gradient_and_forms_by_name_stay():
    for module in (SOC(4, 1, scale=1.0, fast_gradient=True), SOC(4, 1, scale=1.0, form="spatial")):
        state = module.init(jax.random.key(0), SHAPE)
        ops = [op for _, op in module.apply(state, SHAPE)]
        assert any(isinstance(part, operators.ConvExponential) for part in parts(ops))


def test_a_kernel_of_several_taps_has_the_norm_of_its_own_map():
    alpha = jnp.asarray(1.0)
    with pytest.raises(ValueError, match="expected one tap, or one size"):
        cayley.packed_response(jnp.ones((3, 1, 2, 2)), alpha, (1, 1), (4, 4))
    fixed, _ = cayley.packed_response(jnp.ones((3, 1, 2, 2)), alpha, (4, 4), (4, 4))
    assert fixed.shape == (4, 2, 2)
