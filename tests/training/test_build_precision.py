"""config.build_precision: products of parametrisations in parts, on GPUs alone; how precise they are, simulated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_helpers import tiny_config

from benchmarks import build_precision
from lipjax import _precision, linalg
from lipjax.errors import UserError
from lipjax.plan import chips, flops, hlo, plan
from lipjax.training.config import validate
from lipjax.training.loop import Run

RECIPE = {"model.neck": "cholesky", "model.dense_depth": 1}


@pytest.mark.x64_off
def test_a_step_on_gpus_takes_them_and_none_elsewhere():
    run = Run(tiny_config(**RECIPE, build_precision="tf32x3"), 0)
    parts, plain = (flops.count(plan.traced_step(run, platform).jaxpr)[0] for platform in ("gpu", "cpu"))
    # Forward and back; convolutions' norms are estimated at the highest precision as ever.
    assert parts["tf32x3"] > 10_000 and parts["highest"] > 10_000 and "tf32x3" not in plain
    assert parts["tf32x3"] + parts["highest"] == pytest.approx(plain["highest"], rel=1e-12)
    assert parts["default"] == plain["default"]


def test_other_names_are_refused():
    config = tiny_config()
    with config.unlocked():
        config.build_precision = "tf32"
    with pytest.raises(UserError, match=r"config.build_precision: expected one of \('float32', 'tf32x3', 'bfloat16x6'"):
        validate(config)


def kinds(dtype):
    def both_ways(w):
        q, pull_back = jax.vjp(linalg.cayley, w)
        return pull_back(q)

    with _precision.products("tf32x3"):
        return set(flops.count(jax.make_jaxpr(both_ways)(jax.ShapeDtypeStruct((3, 2), dtype)))[0])


def test_certificates_are_built_of_float64_products_in_any_context():
    assert kinds(jnp.float64) == {"highest"}
    assert kinds(jnp.float32) == {"tf32x3"}  # control


# Relative to |x| |y|: what is dropped. TF32 has 11 bits: two parts leave 2^-22 of a number, and x2 y2 is left out;
# bfloat16 has 8: three parts leave 2^-24, and x2 y3 + x3 y2 (2^-24 each) and x3 y3 are left out.
DROPPED = {"tf32x3": 3 * 2.0**-22, "bfloat16x6": 5 * 2.0**-24}


@pytest.mark.parametrize("kind", sorted(DROPPED))
def test_simulated_products_and_their_derivatives_err_as_derived(kind):
    rng, inner = np.random.default_rng(0), 40
    x, y, g = (rng.standard_normal(s).astype(np.float32) for s in ((3, 5, inner), (inner, 7), (3, 5, 7)))

    def error(found, left, right):
        exact, size = left.astype(np.float64) @ right.astype(np.float64), np.abs(left) @ np.abs(right)
        return np.max(np.abs(np.asarray(found, np.float64) - exact) / size)

    def limit(terms):  # sums of that many exact products, and of six sums, of which all but one are small
        return 1.1 * DROPPED[kind] + (terms + 6) * 2.0**-24

    found, pull_back = jax.vjp(lambda x, y: build_precision.simulated(x, y, kind), x, y)
    assert error(found, x, y) <= limit(inner)
    of_x, of_y = pull_back(g)
    assert error(of_x, g, y.T) <= limit(7)
    assert error(of_y, x.reshape(-1, inner).T, g.reshape(-1, 7)) <= limit(15)
    assert error(build_precision.simulated(x, y, "tf32"), x, y) > 10 * limit(inner)  # control


@pytest.mark.nightly
@pytest.mark.x64_off
def test_matrices_made_of_them_are_as_orthogonal_as_in_float32():
    w = np.random.default_rng(0).standard_normal((24, 24)).astype(np.float32)
    full, parts, plain = (build_precision.departures("expm_skew", kind, w) for kind in ("float32", "tf32x3", "tf32"))
    assert max(parts) < 4 * max(full) + 2.0**-22
    assert min(plain) > 50 * max(parts)  # control


def test_plans_count_them_at_their_own_speed():
    gpu, tpu = chips.CHIPS["h100"].flops, chips.CHIPS["v5e"].flops
    for name in ("tf32x3", "bfloat16x6"):
        assert 2 * gpu["highest"] < gpu[name] < gpu["default"] / 2.9
        assert tpu[name] == tpu["highest"]
    program = hlo.Program(
        """ENTRY %main (a: f32[4,8], b: f32[8,2]) -> f32[4,2] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,2]{1,0} parameter(1)
  %c = f32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, algorithm=dot_tf32_tf32_f32_x3
  ROOT %d = f32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, operand_precision={highest,highest}
}
"""
    )
    assert program.flops() == {"tf32x3": 128.0, "highest": 128.0}
