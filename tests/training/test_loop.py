"""The training loop: an interrupted run continues as if nothing had happened, selects on validation."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiers import everyday
from training_helpers import (  # noqa: F401  quick_compiles is a fixture
    differing,
    final_state,
    interrupt_at,
    latest_step,
    made_up_images,
    metric_lines,
    npz_file,
    quick_compiles,
    scratch,
    tiny_config,
    trained,
)

from lipjax.errors import UserError
from lipjax.training import clock, loop
from lipjax.training.loop import METRIC, Run, train
from lipjax.training.same_run import check_same_run, plain

pytestmark = pytest.mark.x64_off


# Nine steps in three epochs, saved after 2, 3, 4, 6, 8 and 9: the first is the middle of an epoch, the second its end.
@pytest.mark.parametrize(("step", "resumes_at"), everyday([(5, 4), (7, 6)], (5, 4)))
def test_an_interrupted_run_resumed_is_the_uninterrupted_run_bit_for_bit(
    tmp_path, monkeypatch, capsys, step, resumes_at
):
    config = tiny_config()
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path, 0)
    assert latest_step(tmp_path) == resumes_at
    capsys.readouterr()
    train(config, tmp_path, 0)
    said = capsys.readouterr().out
    assert f"Resuming {tmp_path} from step {resumes_at} of 9." in said and "48 train, 12 validation, 15 test" in said
    assert differing(final_state(tmp_path, config), final_state(trained(), config)) == []
    assert metric_lines(tmp_path) == metric_lines(trained())
    # Controls: the comparison of states sees another seed's, and the lines say something.
    assert any("params" in name for name in differing(final_state(trained(), config), Run(config, 1).fresh_state()))
    lines = [json.loads(line) for line in metric_lines(trained())]
    losses = [line.get("loss", line.get("cross_entropy")) for line in lines]
    assert len(losses) == 6 and len(set(losses)) == 6


def test_training_never_sees_the_test_split(tmp_path):
    images, labels = made_up_images(21, seed=5)
    config = tiny_config(
        **{"data.path": str(npz_file("other_test", test_images=images[::-1], test_labels=labels[::-1]))}
    )
    train(config, tmp_path, 0)
    assert metric_lines(tmp_path) == metric_lines(trained())
    assert differing(final_state(tmp_path, config), final_state(trained(), tiny_config())) == []


def test_the_best_checkpoint_is_that_of_the_validation_metric(tmp_path, monkeypatch):
    scores = iter([0.5, 0.9, 0.7])
    monkeypatch.setattr(Run, "validator", lambda self: lambda state: {METRIC: next(scores)})
    run = train(tiny_config(), tmp_path, 0)
    _, state, step = loop.load_best(tmp_path, run)
    assert step == int(state.step) == 6
    assert latest_step(tmp_path) == 9  # control: the best is not simply the last


def test_validation_counts_each_image_once(tmp_path):
    run = Run(tiny_config(), 0)
    state = run.fresh_state()
    found = run.validator()(state)  # 12 images in a batch of 16
    part = run.dataset.split("validation")
    logits = np.asarray(
        run.model.apply({"params": state.params}, jax.numpy.asarray(part.images / np.float32(255))), np.float64
    )
    own = np.take_along_axis(logits, part.labels[:, None], 1)[:, 0]
    assert found["accuracy"] == np.mean(logits.argmax(1) == part.labels)
    # Twelve float32 losses of size 1, each with a relative error of some eps.
    np.testing.assert_allclose(found["cross_entropy"], np.mean(np.log(np.exp(logits).sum(1)) - own), rtol=1e-5)
    assert set(found) == {"accuracy", "cross_entropy", METRIC, "lipschitz_estimate"}


@pytest.mark.parametrize(
    ("changes", "seed", "message"),
    [
        ({"certify.radii": (0.5,), "checkpoint.every_steps": 0, "mesh.data": 2, "seeds": (0, 1)}, 0, None),
        ({"data.download": True, "data.data_dir": "/elsewhere"}, 0, None),
        ({"optimizer.learning_rate": 0.04}, 0, r"config.optimizer.learning_rate: 0.03 there, 0.04 now"),
        ({"data.crop_padding": 0, "certify.radii": (0.5,)}, 0, r"\(config.data.crop_padding: 1 there, 0 now\)"),
        ({}, 1, "config.seeds: 0 there, 1 now"),
    ],
)
def test_what_may_change_between_runs(capsys, changes, seed, message):
    config = tiny_config(**changes)
    if message is None:
        train(config, trained(), seed)
        assert "trained already, to step 9 of 9" in capsys.readouterr().out
    else:
        before = metric_lines(trained())
        with pytest.raises(UserError, match=message):
            train(config, trained(), seed)
        assert metric_lines(trained()) == before
    saved = json.loads((trained() / "config.json").read_text())["config"]
    assert saved["optimizer"]["learning_rate"] == 0.03
    train(tiny_config(), trained(), 0)  # puts config.json back


def test_a_run_belongs_to_its_data():
    meta = {"config": plain(tiny_config()), "seed": 0, "data": {"train": "a", "test": "b"}}
    check_same_run("run", meta, tiny_config(), 0, {"train": "a", "test": "b"})
    with pytest.raises(UserError, match="other images"):
        check_same_run("run", meta, tiny_config(), 0, {"train": "a", "test": "c"})
    moved = tiny_config(**{"data.path": "elsewhere.npz"})  # a path says nothing that the images do not say
    check_same_run("run", meta, moved, 0, {"train": "a", "test": "b"})
    run, other = Run(tiny_config(), 0), Run(tiny_config(), 1)
    assert run.data_identity["train"] == run.dataset.fingerprint("train") != other.data_identity["train"]


def test_a_config_of_something_else_is_not_overwritten(tmp_path):
    path = tmp_path / "config.json"
    for text in ('{"model_type": "bert"}', "not JSON"):
        path.write_text(text)
        with pytest.raises(UserError, match="not the config of a lipjax run"):
            train(tiny_config(), tmp_path, 0)
        assert path.read_text() == text


def test_a_run_of_an_older_version_lacks_fields_and_resumes():
    meta = {"config": plain(tiny_config()), "seed": 0}
    del meta["config"]["data"]["affine"], meta["config"]["optimizer"]["clip_norm"]
    check_same_run("run", meta, tiny_config(), 0)
    with pytest.raises(UserError, match="clip_norm: 3.0 there, 2.0 now"):
        check_same_run("run", meta, tiny_config(**{"optimizer.clip_norm": 2.0}), 0)


@pytest.mark.nightly
def test_a_directory_without_a_checkpoint_starts_anew_with_any_config(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(**{"optimizer.clip_norm": 2.0}), tmp_path, 0)
    assert (tmp_path / "config.json").exists() and latest_step(tmp_path) is None
    train(tiny_config(), tmp_path, 0)
    assert metric_lines(tmp_path) == metric_lines(trained())


def test_each_function_compiles_once(tmp_path, caplog):
    shutil.copytree(trained(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "9")
    with jax.log_compiles():
        train(tiny_config(), tmp_path / "fresh", 0)  # two ways to come by a state: fresh and restored
        fresh = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling jit(")]
        caplog.clear()
        train(tiny_config(), tmp_path / "run", 0)
        resumed = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling jit(")]
    for messages in (fresh, resumed):
        counts = {name: sum(f"jit({name})" in m for m in messages) for name in ("array_step", "prepare", "evaluate")}
        assert counts == {"array_step": 1, "prepare": 1, "evaluate": 1}
        # Of the epochs' order JAX remembers the program, since the function is the same in every run.
        assert sum("jit(epoch_order)" in m for m in messages) <= 1


def test_bad_data_stop_before_anything_is_written(tmp_path):
    for changes, message in (
        ({"batch_size": 15, "mesh.data": 2}, "batch_size = 15 does not divide over 2 devices"),
        ({"batch_size": 64}, "batch_size = 64 exceeds the 48 training images"),
        ({"mesh.data": 9}, "9 devices, but JAX sees 8"),
        ({"data.path": str(tmp_path / "none.npz")}, "there is no file"),
        ({"model.width": 5}, "an even width, got depth 1 and width 5"),
        ({"model.name": "resnet"}, "config.model.name: expected one of"),
        ({"model.input_mean": (0.5, 0.5)}, "config.model does not fit images"),
    ):
        config = tiny_config(**{n: v for n, v in changes.items() if n != "model.input_mean"})
        if "model.input_mean" in changes:
            with config.unlocked(), config.ignore_type():
                config.model.input_mean = changes["model.input_mean"]
        with pytest.raises(UserError, match=message):
            train(config, tmp_path / "run", 0)
        assert not (tmp_path / "run").exists()


def test_training_keeps_the_time_of_its_steps():
    """clock.jsonl: all but the first step of a process, which is compiled."""
    lines = clock.read_clock(trained())
    per_epoch = lines[0]["step"]
    assert [line["step"] for line in lines] == [per_epoch * (i + 1) for i in range(len(lines))]
    assert [line["steps"] for line in lines] == [per_epoch - 1] + [per_epoch] * (len(lines) - 1)
    assert all(line["seconds"] > 0 and line["processor_seconds"] > 0 for line in lines)
