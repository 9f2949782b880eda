"""The train state and the jitted steps: pure functions of explicit state."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lipjax import _precision, bounds, certify, curvature, losses, spectral
from lipjax.network import Application
from lipjax.nn import COLLECTION, LOG_SCALE, LipschitzModel, advance_means
from lipjax.operators import MLPHead
from lipjax.training import augment, guard, sharding
from lipjax.training.accumulate import accumulate
from lipjax.training.objective import LOSSES, Seen
from lipjax.training.randaugment import random_augment

LIPSCHITZ = ("product", "liplt")
CLASS_WEIGHTS = ("none", "balanced")
METRIC = "certified_accuracy_estimate"
GPU = ("cuda", "gpu", "rocm")
# Up to this many classes the curvatures of all pairs are cheaper than those of every image's own rivals, of which the
# papers' code takes 9. Power iterations from a warm vector.
_MAX_TABLE, _RIVALS, _CURVATURE_ITERS = 20, 9, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes.

    Attributes:
      step: int32, batches seen; -1 - k from batch k on, if that gave a value that is not finite (guard.py).
      params: the model's. lip: its state: vectors that the next estimates start from.
      opt_state: optax. key: typed PRNG key, constant; batches are functions of (key, step).
    """

    step: Any  # these are arrays, or what stands for arrays: shapes, shardings
    params: Any
    lip: Any
    opt_state: optax.OptState
    key: Any


def init_state(
    model: LipschitzModel, optimizer: optax.GradientTransformation, key: jax.Array, lipschitz: str = "product"
) -> TrainState:
    """A fresh train state.

    Args:
      model: initialised on one image of zeros of its input_shape.
      optimizer: initialised on the parameters.
      key: typed PRNG key, split into one for the parameters and one for the data.
      lipschitz: one of LIPSCHITZ; the state holds the start vectors of its estimate.
    Returns: the state, with parameters in float32, at step 0.
    Raises: NotCertifiable if lipschitz is "liplt" and LipLT does not support a layer of the network, naming it.
    """
    init_key, data_key = jax.random.split(key)
    variables: Any = model.init(init_key, jnp.zeros((1, *model.input_shape)))
    # Single precision, whatever the process does by default: pixels are, and the two would not mix.
    params, lip = jax.tree.map(
        lambda a: a.astype(jnp.float32), (variables["params"], {"vectors": {}, **variables.get(COLLECTION, {})})
    )
    if lipschitz == "liplt":
        network: Any = model.apply({"params": params, COLLECTION: lip}, method="build")
        vectors = bounds.init_liplt_vectors(network, jax.random.fold_in(init_key, 1))
        lip["vectors"] = jax.tree.map(lambda v: v.astype(jnp.float32), vectors)
    return TrainState(jnp.zeros((), jnp.int32), params, lip, optimizer.init(params), data_key)


def epoch_order(key: jax.Array, epoch, num_images: int) -> jax.Array:
    """The order in which an epoch visits the training images: a permutation that depends on (key, epoch) alone."""
    return jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, 0), epoch), num_images)


def preprocess(key: jax.Array, images: jax.Array, config_data, pixel_max: int) -> jax.Array:
    """Augmented pixels in [0, 1] of a uint8 batch, as the data group of the config says."""
    crop_key, affine_key = jax.random.split(key)
    images = augment.augment(crop_key, images, crop_padding=config_data.crop_padding, flip=config_data.flip)
    rand = config_data.randaugment
    if rand.probability > 0:
        options = {"probability": rand.probability, "num_ops": rand.num_ops, "magnitude": rand.magnitude}
        images = random_augment(jax.random.fold_in(key, 2), images, **options)
    pixels = augment.to_pixels(images, pixel_max)
    rotation, scale, shift = config_data.affine
    if rotation or scale or shift:
        pixels = augment.random_affine(affine_key, pixels, max_rotation=rotation, max_scale=scale, max_shift=shift)
    return pixels


def views(key: jax.Array, images, labels, config_data, pixel_max: int, mesh: Mesh):
    """Images for a step to train on, (pixels, labels): of a uint8 batch and its labels or of pairs (real, generated).

    Real and generated images are augmented apart. On each device the real ones come first.
    """
    if not isinstance(images, tuple):
        return preprocess(key, images, config_data, pixel_max), labels
    real = preprocess(key, images[0], config_data, pixel_max)
    padding, flip = config_data.generated.crop_padding, config_data.flip
    generated = augment.augment(jax.random.fold_in(key, 3), images[1], crop_padding=padding, flip=flip)
    pixels = real, augment.to_pixels(generated, pixel_max)
    return sharding.side_by_side(pixels, mesh), sharding.side_by_side(labels, mesh)


def estimate_constants(network, lip, num_iters: int, lipschitz: str):
    """Estimates, perhaps low, that radii and losses are made of, and the state with its vectors advanced.

    Args: lipschitz: one of LIPSCHITZ, what the estimate is made by; lip["vectors"] are that one's.
    Returns: ({"lipschitz": (k, k), of the logit differences; unless by "liplt" also "features": the Lipschitz constant
      of pixels -> features, and "curvature": (k, k), of an MLP head}, lip).
    """
    if lipschitz == "liplt":
        constants, vectors = bounds.margin_liplt_estimate(network, lip["vectors"], num_iters)
        return {"lipschitz": constants}, {**lip, "vectors": vectors}
    product, vectors = bounds.feature_lipschitz_estimate(network, lip["vectors"], num_iters)
    constants = {"features": product, "lipschitz": product * network.head.pairwise_lipschitz()}
    # A training step estimates no norms of contractions, whose vectors wait for the next evaluation.
    lip = {**lip, "vectors": {**lip["vectors"], **vectors}}
    if isinstance(network.head, MLPHead):
        w1, w2 = jax.lax.stop_gradient((network.head.w1, network.head.w2))
        start = lip["head"]["vector"]
        sigma, vector = spectral.power_iteration(lambda v: w1 @ v, lambda y: y @ w1, start, num_iters)
        constants["curvature"] = curvature.norm_table(sigma, w2)
        lip["head"] = {"vector": vector}
    return constants, lip


def radius_estimate(network, constants, features, logits):
    """The radius of every image by these constants, pixel units: a number to watch, no certificate."""
    if not isinstance(network.head, MLPHead):
        return certify.certified_radius(logits, constants["lipschitz"])
    head = network.head
    radius = certify.mlp_radius(features, head.w1, head.b1, head.w2, head.b2, curvature=constants["curvature"])
    return radius / constants["features"]


def _curvatures(head: MLPHead, vector, logits, labels):
    """(b, r): the larger of both sides' curvatures of each label's difference to its largest rivals."""
    rivals = curvature.top_rivals(jax.lax.stop_gradient(logits), labels, min(_RIVALS, logits.shape[1] - 1))
    labels = jnp.broadcast_to(labels[:, None], rivals.shape)
    if logits.shape[1] <= _MAX_TABLE:
        table = curvature.estimate_table(head.w1, head.w2, vector, _CURVATURE_ITERS)
        return jnp.maximum(table, table.T)[labels, rivals]
    sides = [
        curvature.estimate(head.w1, head.w2, *pair, vector, _CURVATURE_ITERS)
        for pair in ((labels, rivals), (rivals, labels))
    ]
    return jnp.maximum(*sides)


def _per_example_loss(config, network, lip, logits, labels, constants, schedule, class_counts):
    scale = constants.get("scale", 1.0)  # of the function that is trained: its constants are larger as well

    def curvatures():
        return scale * _curvatures(network.head, lip["head"]["vector"], logits, labels)

    seen = Seen(scale * logits, labels, scale * constants["lipschitz"], curvatures, class_counts)
    return LOSSES[config.name].apply(config, seen, schedule)


def products_for(config, platform: str):
    """A context in which that part of a step is traced, and its gradient: config.build_precision, for GPUs."""
    return _precision.products(config.build_precision if platform in GPU else "float32")


def make_build(model, config, mesh: Mesh):
    """Makes the part of a training step without images: (params, lip) -> ((network, constants), lip), differentiable.

    constants: as `estimate_constants`, and of a model with a `logit_scale` the "scale" of logits in losses. Parameters
    come in the parts that they are stored in; all that goes out is whole on every device. What it takes to make it is
    divided over the devices.
    """

    def build(params, lip):
        params, lip = sharding.gathered((params, lip), mesh)
        # A network that is only to give features is the one that will be certified.
        train = not config.train_head_only
        variables = {"params": params, COLLECTION: lip}
        network, advanced = model.apply(variables, train, method="build", mutable=[COLLECTION])
        network = sharding.gathered(network, mesh)
        lip = {"vectors": {}, **advanced.get(COLLECTION, {})}
        found = estimate_constants(network, lip, config.power_iterations, config.lipschitz)
        constants, lip = sharding.gathered(found, mesh)
        if LOG_SCALE in params:
            constants = {**constants, "scale": jnp.exp(params[LOG_SCALE])}
        return (network, constants), lip

    return build


def balanced_weights(labels, num_classes: int) -> np.ndarray:
    """The weight of an image of each class, (k,) float32, so that all classes count alike: n / (k n_class).

    Args: labels: (n,), of the training images, over which the mean of the weights is 1. Classes without one get 0.
    """
    counts = np.bincount(labels, minlength=num_classes)
    present = np.count_nonzero(counts)
    return np.where(counts > 0, len(labels) / (present * np.maximum(counts, 1)), 0).astype(np.float32)


def _counted(values, labels, class_weights):
    """Values of images, each times the weight of its class; labels of -1 stand for no image."""
    return values if class_weights is None else values * jnp.asarray(class_weights)[jnp.maximum(labels, 0)]


def make_train_step(
    model,
    optimizer,
    config,
    mesh: Mesh,
    pixel_max: int,
    class_weights: np.ndarray | None = None,
    *,
    diagnose: bool = False,
    platform: str | None = None,
):
    """The training step (state, images, labels, schedule) -> (state, metrics).

    images: uint8 (global batch, h, w, c); labels: int32; or each a pair, of the real and the generated part of the
    batch; schedule: of the epoch, by `objective.loss_schedule`. class_weights: (k,), by which the losses of images are
    multiplied before their mean over the batch, which is divided by the number of images: then it does not depend on
    how the batch is divided over devices and micro-batches. A step that meets a value that is not finite leaves
    parameters, state and optimizer as they are, and so do all after it; metrics["finite"] is then False. diagnose: in
    the place of metrics a step returns `guard.step_flags`, which say where that was; it takes such a state as well.
    platform: of the devices that `config.build_precision` is for; None: those of the mesh.
    """
    multiplied_by = mesh.devices.flat[0].platform if platform is None else platform

    build = make_build(model, config, mesh)
    axes = mesh.axis_names if mesh.size > 1 else ()
    application = Application(config.precision, config.remat, config.scan, axes)

    @sharding.spread_over(mesh)
    def step(state: TrainState, images, labels, schedule):
        key = jax.random.fold_in(jax.random.fold_in(state.key, 1), guard.batches_seen(state.step))
        pixels, labels = views(key, images, labels, config.data, pixel_max, mesh)
        pixels = jax.lax.with_sharding_constraint(pixels, sharding.batch_sharded(mesh))

        # Of the whole batch, on all devices and in all micro-batches.
        class_counts = losses.class_counts(labels, model.num_classes)

        # Parametrised once, applied by each device to one micro-batch of its images after the other, differentiated
        # once.
        with products_for(config, multiplied_by):
            built, pull_back, lip = jax.vjp(lambda params: build(params, state.lip), state.params, has_aux=True)

        def objective(built, constant, pixels, labels):
            (network, constants), (lip, class_counts, schedule) = built, constant
            # The normalisation is no parameter: nothing needs the gradient of the pixels.
            fixed = jax.lax.stop_gradient({"input_mean": network.input_mean, "input_std": network.input_std})
            network = dataclasses.replace(network, **fixed)
            features, means = network.features_and_means(pixels, application)
            if config.train_head_only:
                features = jax.lax.stop_gradient(features)
            logits = network.head(features)
            each = _per_example_loss(config.loss, network, lip, logits, labels, constants, schedule, class_counts)
            loss = jnp.mean(_counted(each, labels, class_weights))
            return loss, (logits, radius_estimate(network, constants, features, logits), means)

        def of_shard(whole, pixels, labels):
            built, constant = whole

            def value_and_grad(built, *part):
                return jax.value_and_grad(objective, has_aux=True)(built, constant, *part)

            return accumulate(value_and_grad, built, (pixels, labels), config)

        whole = built, (lip, class_counts, schedule)
        (loss, (logits, radii, means)), cotangents = sharding.averaged(of_shard, mesh)(whole, pixels, labels)
        with products_for(config, multiplied_by):
            grads = sharding.stored(pull_back(cotangents)[0], mesh)
        constants, lip = built[1], advance_means(lip, means)
        norm = optax.tree.norm(grads)
        # Known before the update, whose kernels keep or replace what they read; and few numbers, so few kernels.
        good = guard.finite((constants, logits, loss, norm)) & (state.step >= 0)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        fresh = dataclasses.replace(state, params=params, lip=lip, opt_state=opt_state)
        kept = jax.tree.map(lambda new, old: new if new is old else jnp.where(good, new, old), fresh, state)
        stepped = dataclasses.replace(kept, step=guard.after(state.step, good))
        if diagnose:
            return stepped, guard.step_flags(state, constants, lip, logits, loss, grads, norm, fresh)
        correct = jnp.argmax(logits, axis=1) == labels
        metrics = {
            "loss": loss,
            "accuracy": jnp.mean(correct),
            "certified_accuracy_estimate": jnp.mean(correct & (radii > config.loss.epsilon)),
            "grad_norm": norm,
            "finite": good,
        }
        if "scale" in constants:
            metrics["logit_scale"] = constants["scale"]
        return stepped, metrics

    return step


def jit_array_step(step, mesh: Mesh, batch_size: int, shardings: Any = None):
    """Jits a step for a data set that lives on the devices: (state, images, labels, order, start, schedule, generated).

    images, labels: the whole training set, replicated; order: of this epoch; start: position of the batch in it;
    generated: none, or the (images, labels) that complete a batch of which only batch_size images are real. The
    gather of a batch-sharded index from a replicated array needs no communication. shardings: of the state
    (`sharding.state_shardings`), as it comes in and goes out; None if all of it is replicated.
    """

    def array_step(state, images, labels, order, start, schedule, generated=None):
        index = jax.lax.dynamic_slice_in_dim(order, start, batch_size)
        index = jax.lax.with_sharding_constraint(index, sharding.batch_sharded(mesh))
        batch = images[index], labels[index]
        if generated is not None:
            batch = zip(batch, generated, strict=True)
        return step(state, *batch, schedule)

    return jax.jit(array_step, donate_argnums=0, out_shardings=_state_and_metrics(mesh, shardings))


def jit_stream_step(step, mesh: Mesh, shardings: Any = None):
    """Jits a step for batches from the host: (state, images, labels, schedule, generated), sharded over the mesh.

    generated, shardings: as `jit_array_step`.
    """

    def stream_step(state, images, labels, schedule, generated=None):
        batch = images, labels
        if generated is not None:
            batch = zip(batch, generated, strict=True)
        return step(state, *batch, schedule)

    return jax.jit(stream_step, donate_argnums=0, out_shardings=_state_and_metrics(mesh, shardings))


def _state_and_metrics(mesh: Mesh, shardings):
    everywhere = sharding.replicated(mesh)
    return everywhere if shardings is None else shardings, everywhere


def make_eval_step(model, config, mesh: Mesh, pixel_max: int, class_weights: np.ndarray | None = None):
    """Two jitted functions: (params, lip) -> (network, constants); (network, constants, images, labels) -> sums.

    constants: as of `make_build`; sums are over the batch, of each image times the weight of its class. images:
    uint8; labels: int32, -1 for images that only fill up the batch.
    """
    everywhere = sharding.replicated(mesh)

    @functools.partial(jax.jit, out_shardings=everywhere)
    @sharding.spread_over(mesh)
    def prepare(params, lip):
        params, lip = sharding.gathered((params, lip), mesh)
        network = sharding.gathered(model.apply({"params": params, COLLECTION: lip}, method="build"), mesh)
        constants, _ = estimate_constants(network, lip, config.power_iterations_eval, config.lipschitz)
        if LOG_SCALE in params:
            constants = {**constants, "scale": jnp.exp(params[LOG_SCALE])}
        return network, constants

    @functools.partial(jax.jit, out_shardings=everywhere)
    def evaluate(network, constants, images, labels):
        features = network.features(augment.to_pixels(images, pixel_max))
        logits = network.head(features)
        correct = jnp.argmax(logits, axis=1) == labels
        radii = radius_estimate(network, constants, features, logits)
        scaled = constants.get("scale", 1.0) * logits
        found = {
            "accuracy": correct,
            "certified_accuracy_estimate": correct & (radii > config.loss.epsilon),
            "cross_entropy": jnp.where(labels >= 0, losses.cross_entropy(scaled, jnp.maximum(labels, 0)), 0.0),
        }
        return {name: jnp.sum(_counted(values, labels, class_weights)) for name, values in found.items()}

    return prepare, evaluate
