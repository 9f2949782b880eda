"""Predictions for services: few images cost little, and what is no image is refused."""

import jax
import numpy as np
import pytest
from frozen_helpers import frozen_network

from lipjax.certify import float64 as module
from lipjax.errors import UserError

pytestmark = pytest.mark.quick_compiles


@pytest.fixture
def sizes(monkeypatch):
    """The batch sizes that are evaluated, in order."""
    seen, honest = [], module.evaluate

    def spy(network, norms, pixels):
        seen.append(len(pixels))
        return honest(network, norms, pixels)

    monkeypatch.setattr(module, "evaluate", spy)
    return seen


@pytest.mark.parametrize(("count", "expected"), [(1, [1]), (3, [4]), (64, [64]), (200, [256]), (261, [256, 8])])
def test_few_images_are_not_padded_to_a_whole_batch(sizes, count, expected):
    frozen, images = frozen_network(), np.random.default_rng(0).uniform(size=(count, 3, 3, 1))
    logits = frozen(images)
    assert sizes == expected and logits.shape == (count, 3)
    sizes.clear()
    certificate = frozen.certify(images)
    assert sizes == expected and certificate.radii.shape == (count,)


def test_a_batch_that_is_no_power_of_two_is_not_exceeded(sizes):
    frozen, images = frozen_network(), np.random.default_rng(0).uniform(size=(13, 3, 3, 1))
    frozen(images, batch_size=6)
    frozen(images[:5], batch_size=6)
    assert sizes == [6, 6, 1, 6]
    with pytest.raises(ValueError, match="batch_size of at least 1"):
        frozen(images, batch_size=0)


def test_any_number_of_images_takes_few_programs(sizes):
    frozen, images = frozen_network(seed=5), np.random.default_rng(0).uniform(size=(70, 3, 3, 1))
    for count in range(1, 71):
        frozen(images[:count], batch_size=64)
    assert set(sizes) == {1, 2, 4, 8, 16, 32, 64}


def test_the_padding_changes_no_claim():
    frozen, images = frozen_network(), np.random.default_rng(1).uniform(size=(9, 3, 3, 1))
    whole = frozen.certify(images)
    for i in range(9):
        single = frozen.certify(images[i : i + 1])
        assert single.predictions == whole.predictions[i]
        # Another program may round otherwise: at most what the certificate subtracts for it, many ulps of a radius.
        assert single.radii[0] == pytest.approx(whole.radii[i], rel=1e-10)


def test_predict_gives_what_certify_proves():
    frozen, images = frozen_network(), np.random.default_rng(2).uniform(size=(6, 3, 3, 1))
    classes, radii = frozen.predict(images)
    certificate = frozen.certify(images)
    assert np.array_equal(classes, certificate.predictions) and np.issubdtype(classes.dtype, np.integer)
    assert np.array_equal(radii, certificate.radii) and radii.dtype == np.float64 and radii.max() > 0
    assert isinstance(classes, np.ndarray) and not isinstance(radii, jax.Array)
    classes, radii = frozen.predict(images[:0])
    assert classes.shape == radii.shape == (0,)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.5, -0.1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_no_image_is_refused(value, dtype):
    frozen, images = frozen_network(), np.full((4, 3, 3, 1), 0.5, dtype)
    frozen.predict(images)  # control
    images[2, 1, 1, 0] = value
    with pytest.raises(UserError, match="1 of 4 images hold NaN.*image 2" if np.isnan(value) else r"in \[0, 1\]"):
        frozen.predict(images)
    if np.isnan(value):
        assert frozen.certify(images).radii[2] == 0  # as documented there


def test_images_of_another_shape_or_type_are_refused():
    frozen, images = frozen_network(), np.full((4, 3, 3, 1), 0.5)
    for other in (images[0], images.astype(np.uint8), images[..., :0]):
        with pytest.raises(ValueError, match="Expected"):
            frozen.predict(other)
