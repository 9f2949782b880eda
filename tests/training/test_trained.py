"""What a run has trained, taken up again: more epochs, and its variables in Python."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_helpers import (  # noqa: F401  quick_compiles is a fixture
    final_state,
    metric_lines,
    quick_compiles,
    tiny_config,
    trained,
)

import lipjax
from lipjax.errors import UserError
from lipjax.nn import COLLECTION
from lipjax.training import trained as trained_module
from lipjax.training.checkpoint import Checkpointer
from lipjax.training.loop import Run, load_best, train
from lipjax.training.restoring import restore_state
from lipjax.training.same_run import check_same_run, plain
from lipjax.training.step import METRIC

pytestmark = pytest.mark.x64_off


GROWS = {"optimizer.final_fraction": 1.0, "optimizer.warmup_epochs": 1.0, "loss.epsilon_ramp": 0.0}


@pytest.mark.nightly
def test_a_finished_run_gets_more_epochs_as_if_asked_for_them_from_the_start(tmp_path, capsys):
    train(tiny_config(num_epochs=2, **GROWS), tmp_path / "grown", 0)
    load_best(tmp_path / "grown", Run(tiny_config(num_epochs=3, **GROWS), 0))  # of an epoch before it grew
    train(tiny_config(num_epochs=3, **GROWS), tmp_path / "grown", 0)
    assert "from step 6 of 9" in capsys.readouterr().out
    train(tiny_config(num_epochs=3, **GROWS), tmp_path / "whole", 0)
    grown, whole = (final_state(tmp_path / name, tiny_config(num_epochs=3, **GROWS)) for name in ("grown", "whole"))
    assert int(grown.step) == 9
    jax.tree.map(np.testing.assert_array_equal, grown.params, whole.params)
    load_best(tmp_path / "grown", Run(tiny_config(num_epochs=3, **GROWS), 0))


def test_more_epochs_where_schedules_depend_on_them_are_refused_with_a_way_out(capsys):
    before = metric_lines(trained())
    with pytest.raises(
        UserError, match=r"run of 3 epochs, and 5 .*'cosine'.*another --workdir and --config.init_from="
    ):
        train(tiny_config(num_epochs=5), trained(), 0)
    assert metric_lines(trained()) == before
    meta = {"config": plain(tiny_config(**GROWS)), "seed": 0}
    check_same_run("run", meta, tiny_config(num_epochs=5, **GROWS), 0, done=(9, 3))  # control
    for changes, message in (
        ({"num_epochs": 5, "loss.epsilon_ramp": 0.5}, "another config"),  # another field, too
        ({"num_epochs": 2}, "num_epochs: 3 there, 2 now"),
    ):
        with pytest.raises(UserError, match=message):
            check_same_run("run", meta, tiny_config(**GROWS | changes), 0, done=(9, 3))
    with pytest.raises(UserError, match="seeds: 0 there, 1 now"):
        check_same_run("run", meta, tiny_config(num_epochs=5, **GROWS), 1, done=(9, 3))
    ramped = GROWS | {"loss.epsilon_ramp": 0.5}
    with pytest.raises(UserError, match="5 are asked for"):
        saved = {"config": plain(tiny_config(**ramped)), "seed": 0}
        check_same_run("run", saved, tiny_config(num_epochs=5, **ramped), 0, done=(9, 3))
    # A tenth of the rate from half of the epochs on: the same until there.
    step = GROWS | {"optimizer.schedule": "step"}
    saved = {"config": plain(tiny_config(num_epochs=6, **step)), "seed": 0}
    check_same_run("run", saved, tiny_config(num_epochs=12, **step), 0, done=(9, 3))
    with pytest.raises(UserError, match="12 are asked for"):
        check_same_run("run", saved, tiny_config(num_epochs=12, **step), 0, done=(10, 3))


def test_a_trained_run_loads_by_one_call(tmp_path, monkeypatch):
    run = Run(tiny_config(), 0)
    expected, _, _ = load_best(trained(), run)
    pixels = jnp.asarray(np.random.default_rng(0).uniform(size=(2, *run.model.input_shape)), jnp.float32)
    with monkeypatch.context() as patch:
        patch.setattr("lipjax.training.loop.load_dataset", None)  # the data set is not needed
        model, variables = trained_module.load_trained(trained())
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    assert (model.input_shape, model.num_classes) == (run.model.input_shape, run.model.num_classes)
    logits = model.apply(variables, pixels)
    np.testing.assert_allclose(lipjax.freeze(model, variables)(np.asarray(pixels)), logits, atol=1e-4)
    with pytest.raises(UserError, match="holds no training run"):
        trained_module.load_trained(tmp_path)
    (tmp_path / "seed_3").mkdir()
    (tmp_path / "seed_3" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="several runs: .*seed_3"):
        trained_module.load_trained(tmp_path)


def test_a_run_without_the_size_of_its_images_loads_by_its_data(monkeypatch):
    meta = trained_module.best_meta(trained())
    assert meta["shape"] == {"input_shape": [8, 8, 1], "num_classes": 3}
    monkeypatch.setattr(trained_module, "best_meta", lambda _: {k: v for k, v in meta.items() if k != "shape"})
    expected, _, _ = load_best(trained(), Run(tiny_config(), 0))
    model, variables = trained_module.load_trained(trained())
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


def saved_without(source, directory, name):
    """The last checkpoint of a run, as a lipjax would have saved it that did not estimate the norm of a layer."""
    with Checkpointer(source / "checkpoints", best_metric=METRIC, read_only=True) as checkpointer:
        state, meta = checkpointer.restore(Run(tiny_config(), 0).abstract_state)
    vectors = {layer: vector for layer, vector in state.lip["vectors"].items() if layer != name}
    assert len(vectors) == len(state.lip["vectors"]) - 1
    state = dataclasses.replace(state, lip={**state.lip, "vectors": vectors})
    directory.mkdir()
    shutil.copy(source / "config.json", directory)
    with Checkpointer(directory / "checkpoints", best_metric=METRIC) as checkpointer:
        checkpointer.save(int(state.step), state, meta, 1.0)
    return state


def test_vectors_of_estimates_that_an_older_lipjax_did_not_make_begin_anew(tmp_path):
    run = Run(tiny_config(), 0)
    name = next(iter(run.abstract_state.lip["vectors"]))
    state = saved_without(trained(), tmp_path / "old", name)
    fresh = run.initial_state()
    with Checkpointer(tmp_path / "old" / "checkpoints", best_metric=METRIC, read_only=True) as checkpointer:
        with pytest.raises(UserError, match=f"lip.vectors.{name}.* expected, but not saved"):  # control
            checkpointer.restore(run.abstract_state)
        resumed, _ = restore_state(checkpointer, run.abstract_state, run.initial_state)
    assert jax.tree.structure(resumed) == jax.tree.structure(run.abstract_state)
    for layer, vector in resumed.lip["vectors"].items():
        expected = fresh if layer == name else state
        jax.tree.map(np.testing.assert_array_equal, vector, expected.lip["vectors"][layer])
    jax.tree.map(np.testing.assert_array_equal, resumed.params, state.params)
    for variables in (load_best(tmp_path / "old", run)[0], lipjax.training.load_trained(tmp_path / "old")[1]):
        jax.tree.map(np.testing.assert_array_equal, variables["params"], state.params)
        assert variables[COLLECTION]["vectors"].keys() == run.abstract_state.lip["vectors"].keys()


def test_other_missing_parts_are_still_refused(tmp_path):
    state = saved_without(trained(), tmp_path / "old", next(iter(Run(tiny_config(), 0).abstract_state.lip["vectors"])))
    abstract = jax.eval_shape(lambda: state)
    more = dataclasses.replace(abstract, params={**abstract.params, "another": jax.ShapeDtypeStruct((2,), jnp.float32)})
    with (
        Checkpointer(tmp_path / "old" / "checkpoints", best_metric=METRIC, read_only=True) as checkpointer,
        pytest.raises(UserError, match=r"params.another: float32\[2\] expected, but not saved"),
    ):
        restore_state(checkpointer, more, lambda: state)
