"""A LipNeXt-style network by config: steps on the manifold keep what is certified near 1."""

import jax
import numpy as np
import pytest
from tiers import everyday
from training_helpers import quick_compiles, tiny_config  # noqa: F401  quick_compiles is a fixture

import lipjax
from lipjax import manifold
from lipjax.nn import COLLECTION
from lipjax.training import sharding
from lipjax.training.choices import update
from lipjax.training.loop import Run

MODEL = {"tokens": 4, "width": 16, "depth": 2, "regions": 2, "neck_features": 8, "logit_scale": 2.0}


@pytest.mark.x64_off
@pytest.mark.parametrize(
    ("optimizer", "largest"), everyday([("manifold_adam", 1e-5), ("adam", None)], ("manifold_adam", 1e-5))
)
def test_steps_on_the_manifold_stay_there(optimizer, largest):
    config = tiny_config()
    update(config, {"model.name": "lipnext", "optimizer.name": optimizer, "optimizer.learning_rate": 0.05})
    update(config, {f"model.{name}": value for name, value in MODEL.items()} | {"model.orthogonal": "manifold"})
    run = Run(config, 0)
    state, train_batch = run.fresh_state(), run.batch_runner(0)
    for step in range(2):
        state, metrics = train_batch(state, step, {"epsilon": 0.1})
        assert metrics["finite"]
    frozen = lipjax.freeze(run.model, {"params": state.params, COLLECTION: state.lip})
    excess = max(row.claimed - 1 for row in frozen.lipschitz_report() if row.name.startswith("block"))
    assert excess < largest if largest else excess > 1e-3  # control: another optimizer leaves the manifold


@pytest.mark.nightly  # compiles for eight devices for minutes
@pytest.mark.x64_off
@pytest.mark.parametrize("lookahead", [0, 2])
def test_steps_are_the_same_where_matrices_are_stored_in_parts(lookahead, monkeypatch, capfd):
    """On 4 x 2 devices: the same losses as on one, orthonormal matrices, and no way between parts that XLA warns of."""
    monkeypatch.setattr(sharding, "MIN_SIZE", 64)

    def train(data, parts, learning_rate=0.05):
        config = tiny_config(**{"batch_size": 16, "mesh.data": data, "mesh.model": parts})
        update(config, {"model.name": "lipnext", "optimizer.name": "manifold_adam"})
        update(config, {"optimizer.lookahead_period": lookahead, "optimizer.learning_rate": learning_rate})
        update(config, {f"model.{name}": value for name, value in MODEL.items()} | {"model.orthogonal": "manifold"})
        run = Run(config, 0)
        state, train_batch, found = run.fresh_state(), run.batch_runner(0), []
        for step in range(3):
            state, metrics = train_batch(state, step, {"epsilon": 0.1})
            found.append(float(metrics["loss"]))
        return jax.tree.leaves(manifold.orthogonal_parameters(state.params)), np.array(found)

    _, expected = train(1, 1)
    matrices, found = train(4, 2)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    # Sums of at most 16 x 8 x 8 numbers in another order, sqrt(n) units each, in three steps of a dozen layers.
    allowed = 3 * 12 * np.sqrt(16 * 8 * 8) * 2.0**-24 * np.abs(expected)
    assert (np.abs(found - expected) <= allowed).all(), (found, expected)
    assert (np.abs(train(1, 1, 0.0505)[1] - expected) > allowed).any()  # control: a rate that is 1 % larger is seen
    for matrix in matrices:
        assert not matrix.is_fully_replicated and matrix.addressable_shards[0].data.size == matrix.size // 2
        x = np.asarray(matrix, np.float64)
        assert np.abs(np.swapaxes(x, 1, 2) @ x - np.eye(x.shape[2])).max() < 1e-5
