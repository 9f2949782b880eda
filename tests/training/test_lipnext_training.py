"""A LipNeXt-style network by config: steps on the manifold keep what is certified near 1."""

import pytest
from training_helpers import quick_compiles, tiny_config  # noqa: F401  quick_compiles is a fixture

import lipjax
from lipjax.nn import COLLECTION
from lipjax.training.choices import update
from lipjax.training.loop import Run

MODEL = {"tokens": 4, "width": 16, "depth": 2, "regions": 2, "neck_features": 8, "logit_scale": 2.0}


@pytest.mark.x64_off
@pytest.mark.parametrize(("optimizer", "largest"), [("manifold_adam", 1e-5), ("adam", None)])
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
