"""Training with generated images: their share of each batch, their augmentation, and runs that resume."""

import shutil

import jax
import numpy as np
import pytest
from data_helpers import take
from generated_helpers import COUNT, mixed_config, numbered_images, opened, write_npz
from training_helpers import (  # noqa: F401  quick_compiles is a fixture
    differing,
    final_state,
    interrupt_at,
    made_up_images,
    npz_file,
    quick_compiles,
    scratch,
    tiny_config,
)

from lipjax.errors import UserError
from lipjax.evaluation import evaluate
from lipjax.training import augment, sharding
from lipjax.training import step as steps
from lipjax.training.config import validate
from lipjax.training.loop import Run, train

SCHEDULE = {"epsilon": 0.1}


@pytest.fixture
def path(tmp_path):
    images, labels = made_up_images(COUNT, seed=9)
    return write_npz(tmp_path / "generated.npz", image=images, label=labels)


def seen_by(run, first, count):
    """The (images, labels) pairs, real and generated, that the steps from `first` on are given."""

    def look(state, images, labels, schedule):
        return state, (images, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "make_train_step", lambda *_, **__: look)
        train_batch, state, found = run.batch_runner(first), run.fresh_state(), []
        for step in range(first, first + count):
            state, batch = train_batch(state, step, SCHEDULE)
            found.append(jax.tree.map(np.asarray, batch))
    return found


@pytest.mark.x64_off
def test_every_step_has_its_share_of_real_and_generated_images(path):
    run = Run(mixed_config(path, **{"mesh.data": 4}), 0)
    assert run.steps_per_epoch == 4 and run.total_steps == 8
    assert "2 epochs of 4 steps of 16 images, 4 of them generated" in str(run)
    batches = seen_by(run, 0, 8)
    part = run.dataset.split("train")
    for (real, made), (real_labels, made_labels) in batches:
        assert len(real) == len(real_labels) == 12 and len(made) == len(made_labels) == 4
    with np.load(path) as file:
        source = [image.tobytes() for image in file["image"]]
    # Real: each of the 48 images once in each of the two epochs. Generated: the batches of the data set, none twice.
    for epoch in (0, 4):
        shown = [image.tobytes() for (real, _), _ in batches[epoch : epoch + 4] for image in real]
        assert sorted(shown) == sorted(image.tobytes() for image in part.images)
    shown = [image.tobytes() for (_, made), _ in batches for image in made]
    assert len(shown) == 32 == len({source.index(image) for image in shown})
    expected = take(opened(path).batches(4, 0), 8)
    for ((_, made), (_, labels)), (images, numbers) in zip(batches, expected, strict=True):
        assert np.array_equal(made, images) and np.array_equal(labels, numbers)
    later = seen_by(run, 3, 2)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (later, batches[3:5])), strict=True))


@pytest.mark.x64_off
def test_real_and_generated_images_are_augmented_apart_and_joined_on_their_devices(key):
    config = mixed_config("x")
    real, made = (np.random.default_rng(s).integers(1, 256, (n, 8, 8, 1), dtype=np.uint8) for s, n in ((0, 16), (1, 8)))
    labels = np.arange(16, dtype=np.int32), 100 + np.arange(8, dtype=np.int32)
    for count in (1, 8):
        mesh = sharding.make_mesh(count, 16)
        split, everywhere = sharding.batch_sharded(mesh), sharding.replicated(mesh)
        arrays = jax.device_put(((real, made), labels), split)
        arguments = jax.device_put(key, everywhere), *arrays
        view = jax.jit(lambda key, images, labels, mesh=mesh: steps.views(key, images, labels, config.data, 255, mesh))
        compiled = view.lower(*arguments).compile()
        pixels, joined = compiled(*arguments)
        order = np.asarray(joined)
        assert sorted(order) == sorted(np.concatenate(labels))
        assert order.reshape(count, -1)[:, : 16 // count].max() < 100  # on each device the real ones come first
        assert pixels.sharding.is_equivalent_to(split, 4)
        shown = {int(label): image for label, image in zip(order, np.asarray(pixels), strict=True)}
        # Whatever the number of devices: the real ones are cropped by 1 pixel, the generated ones by 2 and another key.
        keys = jax.random.split(key)[0], jax.random.fold_in(key, 3)
        for images, first, key_of, padding in ((real, 0, keys[0], 1), (made, 100, keys[1], 2)):
            moved = augment.random_crop(jax.random.split(key_of)[0], jax.numpy.asarray(images), padding)
            found = np.stack([shown[first + index] for index in range(len(images))])
            assert np.array_equal(found, augment.to_pixels(moved, 255)) and not np.array_equal(moved, images)
        program = compiled.as_text() or ""
        assert not any(word in program for word in ("all-gather", "all-to-all", "collective-permute"))


def test_randaugment_treats_the_cropped_image_before_it_becomes_pixels(key, monkeypatch):
    fields = {"data.randaugment.probability": 0.25, "data.randaugment.num_ops": 3, "data.randaugment.magnitude": 5}
    config, seen = tiny_config(**fields), []

    def record(key, images, **options):
        seen.append((jax.random.key_data(key), images, options))
        return images // 2

    monkeypatch.setattr(steps, "random_augment", record)
    images = jax.numpy.asarray(numbered_images(4)[0])
    pixels = steps.preprocess(key, images, config.data, 255)
    ((used, given, options),) = seen
    assert options == {"probability": 0.25, "num_ops": 3, "magnitude": 5}
    assert given.dtype == np.uint8 and np.array_equal(pixels, augment.to_pixels(given // 2, 255))
    plain = steps.preprocess(key, images, tiny_config().data, 255)
    assert len(seen) == 1 and np.array_equal(plain, augment.to_pixels(given, 255))  # the crop is what it was
    others = [jax.random.key_data(k) for k in (key, *jax.random.split(key), jax.random.fold_in(key, 3))]
    assert not any(np.array_equal(used, other) for other in others)


@pytest.mark.nightly
@pytest.mark.x64_off
def test_a_run_trains_resumes_bit_for_bit_and_certifies_without_the_generated_images(tmp_path, path, monkeypatch):
    config = mixed_config(path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole, 0)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(config, parts, 0)
    train(config, parts, 0)
    assert differing(final_state(parts, config), final_state(whole, config)) == []
    assert (parts / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    # Resuming with other generated images is refused; so is leaving them out.
    shutil.rmtree(parts / "checkpoints" / "8")
    saved = path.read_bytes()
    write_npz(path)
    with pytest.raises(UserError, match="the data set has other images or labels: generated"):
        train(config, parts, 0)
    with pytest.raises(UserError, match=r"config.data.generated.path: .*generated.npz' there, '' now"):
        train(mixed_config(""), parts, 0)
    path.unlink()
    with pytest.raises(UserError, match="there is no such file or folder"):
        train(config, parts, 0)
    report = evaluate.certify_run(whole, config, 0)  # needs the test split alone
    assert report["step"] in (4, 8)
    # Nor does a run that starts from this one need them.
    run = Run(mixed_config("", init_from=str(whole)), 0)
    assert any("params" in name for name in differing(run.fresh_state(), run._initialise()))
    assert set(run.training_identity) == {"train", "validation", "test"}
    path.write_bytes(saved)
    train(config, parts, 0)  # control
    assert differing(final_state(parts, config), final_state(whole, config)) == []


def test_missing_files_stop_a_run_before_it_writes_anything(tmp_path):
    config = mixed_config(tmp_path / "none.npz")
    with pytest.raises(UserError, match="none.npz: there is no such file or folder"):
        train(config, tmp_path / "run", 0)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="per_batch = 4 does not divide over 8 devices"):
        Run(mixed_config("x", **{"mesh.data": 8}), 0)
    with pytest.raises(UserError, match="batch_size = 53 less 4 generated images exceeds the 48 .*lower"):
        Run(mixed_config("x", batch_size=53), 0)
    for per_batch in (0, 16):
        with pytest.raises(UserError, match="config.data.generated.per_batch: expected at least 1 and less than"):
            validate(mixed_config("x", **{"data.generated.per_batch": per_batch}))
    validate(mixed_config("", **{"data.generated.per_batch": 16}))  # no path, no generated images


def test_randaugment_is_refused_for_images_that_it_is_not_for():
    with pytest.raises(UserError, match="RandAugment is for values 0 … 255 .* digits has 0 … 16 in 1"):
        Run(tiny_config(**{"data.name": "digits", "data.path": "", "data.randaugment.probability": 0.5}), 0)
