"""Training by CRM with LipLT: the estimate, its start vectors, the schedule, refusals, the whole way to a report."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from training_helpers import final_state, quick_compiles, scratch, tiny_config  # noqa: F401

from lipjax import UserError, bounds
from lipjax.evaluation import evaluate
from lipjax.training import loop
from lipjax.training import step as steps
from lipjax.training.checkpoint import Checkpointer
from lipjax.training.choices import update

pytestmark = pytest.mark.x64_off

NET = {"name": "convnet", "variant": "custom", "convs": ((4, 3, 1, 1), (6, 4, 2, 1)), "dense": (5,)}


def crm_config(**changes):
    """Nine steps of a small net; lambda is 0 in the first of the three epochs."""
    config = tiny_config().copy_and_resolve_references()
    with config.unlocked():
        config.model = ConfigDict({**NET, "activation": "relu", "input_std": (0.5,)})
        config.lipschitz = "liplt"
    update(config, {"loss.name": "crm", "optimizer.name": "adam", "optimizer.schedule": "exponential"})
    with config.unlocked():
        config.loss.update({"epsilon": 0.1, "weight": 3.0, "radius": 2.0, "weight_start_epoch": 1})
        config.loss.update({"weight_growth": 1.5, "radius_growth": 0.5})
        config.optimizer.decay_from = 1.0
    update(config, changes)
    return config.lock()


def lines(directory, kind):
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if kind in line]


@functools.cache
def trained():
    """The directory of a finished run of `crm_config()`, and the run."""
    directory = scratch() / "crm"
    return directory, loop.train(crm_config(), directory, 0)


@pytest.mark.nightly
def test_a_run_trains_resumes_and_certifies(capsys):
    directory, run = trained()
    report = evaluate.certify_run(directory, crm_config(), 0, run)
    assert report["clean_accuracy"] >= report["certified_accuracy"]["0.1"] >= report["certified_accuracy"]["0.25"]
    epochs = lines(directory, "crm_weight")
    assert [line["crm_weight"] for line in epochs] == [0.0, 3.0, 4.5]
    assert [line["crm_radius"] for line in epochs] == [2.0, 2.0, 1.0]
    rates = [line["learning_rate"] for line in epochs]
    np.testing.assert_allclose(rates, [0.03, 0.03 * 1e-5**0.4, 0.03e-5], rtol=1e-5)  # at steps 2, 5 and 8, from 3 on
    certificate = json.loads((directory / "certificate.json").read_text())
    linear = [layer for layer in certificate["layers"] if layer["name"].endswith("/linear")]
    assert len(linear) == 3 and all(0 < layer["estimate"] <= layer["bound"] * (1 + 1e-6) for layer in linear)
    capsys.readouterr()
    loop.train(crm_config(), directory, 0)
    assert "trained already, to step 9 of 9" in capsys.readouterr().out
    with pytest.raises(UserError, match="config.lipschitz: 'liplt' there, 'product' now"):
        loop.train(crm_config(lipschitz="product"), directory, 0)


@pytest.mark.nightly
def test_validation_estimates_by_liplt_from_the_vectors_of_training():
    directory, _ = trained()
    config = crm_config()
    run, state = loop.Run(config, 0), final_state(directory, config)
    fresh = run.fresh_state()
    network = jax.jit(lambda v: run.model.apply(v, method="build"))({"params": state.params})
    expected = jax.eval_shape(lambda: bounds.init_liplt_vectors(network, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, state.lip["vectors"]) == jax.tree.map(jnp.shape, expected)
    pairs = zip(jax.tree.leaves(state.lip["vectors"]), jax.tree.leaves(fresh.lip["vectors"]), strict=True)
    assert all(ours.dtype == jnp.float32 and not np.array_equal(ours, start) for ours, start in pairs)
    prepare, _ = steps.make_eval_step(run.model, config, run.mesh, run.pixel_max)
    warm, cold = (np.asarray(prepare(state.params, lip)[1]["lipschitz"]) for lip in (state.lip, fresh.lip))
    converged = np.asarray(
        jax.jit(bounds.margin_liplt_estimate, static_argnums=2)(network, state.lip["vectors"], 300)[0]
    )
    off = ~np.eye(3, dtype=bool)
    # Five iterations from vectors that nine steps have advanced by one each.
    assert (0.9 * converged[off] < warm[off]).all() and (warm[off] <= converged[off] * (1 + 1e-5)).all()
    assert (cold[off] < warm[off]).all()  # control
    product = jax.jit(bounds.margin_lipschitz_estimate, static_argnums=2)(
        network, bounds.init_vectors(network, jax.random.key(0)), 300
    )[0]
    assert (converged[off] < 0.95 * np.asarray(product)[off]).all()  # control: the two are told apart


@pytest.mark.nightly
def test_crm_max_trains_on_eight_devices_and_its_penalty_moves_parameters():
    run = loop.Run(crm_config(**{"loss.name": "crm_max", "mesh.data": 8}), 0)
    train_batch, heads = run.batch_runner(0), []
    for weight in (0.0, 3.0):
        state = run.fresh_state()
        for step in range(2):
            state, metrics = train_batch(state, step, {"crm_weight": weight, "crm_radius": 2.0})
        assert metrics["finite"]
        heads.append(np.asarray(state.params["head"]["matrix"]))
    assert np.abs(heads[1] - heads[0]).max() > 1e-2


def test_each_function_compiles_once(tmp_path, caplog):
    """Weight and radius are new in every epoch."""
    with jax.log_compiles():
        loop.train(crm_config(), tmp_path, 0)
    messages = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling jit(")]
    for name in ("array_step", "prepare", "evaluate"):
        assert sum(f"jit({name})" in m for m in messages) == 1, name


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        ({"name": "liresnet", "depth": 1, "width": 4, "stem_kernel": 3, "stem_padding": 1}, "stem/activation"),
        ({"name": "lipconvnet", "depth": 1, "num_blocks": 1, "width": 4, "head": "mlp"}, "head"),
    ],
)
def test_liplt_is_refused_where_it_does_not_apply(tmp_path, model, layer):
    config = crm_config().copy_and_resolve_references()
    with config.unlocked():
        config.model = ConfigDict(model)
    with pytest.raises(UserError, match=rf'config.lipschitz "liplt" does not fit config.model: .*{layer}.*"product"'):
        loop.train(config.lock(), tmp_path / "run", 0)
    assert not (tmp_path / "run").exists()
    with config.unlocked():
        config.lipschitz = "product"
    loop.Run(config.lock(), 0)  # control


def test_a_run_by_products_starts_one_by_liplt():
    directory, _ = trained()
    config = crm_config(lipschitz="product", init_from=str(directory))
    state = loop.Run(config, 0).fresh_state()
    with Checkpointer(directory / "checkpoints", best_metric=steps.METRIC, read_only=True) as checkpointer:
        theirs, _ = checkpointer.restore(loop.Run(crm_config(), 0).abstract_state, checkpointer.best_step())
    assert jax.tree.all(jax.tree.map(np.array_equal, state.params, theirs.params))
    assert set(state.lip["vectors"]) == {"conv_01/linear", "conv_02/linear", "dense_01/linear"}
