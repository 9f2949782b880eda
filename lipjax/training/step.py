"""The train state and the jitted steps: pure functions of explicit state."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lipjax import bounds, certify, losses
from lipjax.nn import COLLECTION, LipschitzModel
from lipjax.training import augment, sharding

LOSSES = {
    "emma": lambda config: losses.emma,
    "margin": lambda config: losses.margin,
    "gloro": lambda config: losses.gloro,
    "trades": lambda config: functools.partial(losses.trades, weight=config.trades_weight),
    "certificate_regularization": lambda config: (
        lambda logits, labels, lipschitz, epsilon: (
            losses.certificate_regularization(logits, labels, lipschitz, config.gamma)
        )
    ),
    "cross_entropy": lambda config: lambda logits, labels, lipschitz, epsilon: losses.cross_entropy(logits, labels),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes.

    Attributes:
      step: int32, batches seen. params: the model's. lip: its state: vectors that the next estimates start from.
      opt_state: optax. key: typed PRNG key, constant; batches are functions of (key, step).
    """

    step: Any  # these are arrays, or what stands for arrays: shapes, shardings
    params: Any
    lip: Any
    opt_state: optax.OptState
    key: Any


def init_state(model: LipschitzModel, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """A fresh state. key: typed PRNG key."""
    init_key, data_key = jax.random.split(key)
    variables: Any = model.init(init_key, jnp.zeros((1, *model.input_shape)))
    # Single precision, whatever the process does by default: pixels are, and the two would not mix.
    params, lip = jax.tree.map(lambda a: a.astype(jnp.float32), (variables["params"], variables[COLLECTION]))
    return TrainState(jnp.zeros((), jnp.int32), params, lip, optimizer.init(params), data_key)


def epoch_order(key: jax.Array, epoch, num_images: int) -> jax.Array:
    """The order in which an epoch visits the training images: a permutation that depends on (key, epoch) alone."""
    return jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, 0), epoch), num_images)


def preprocess(key: jax.Array, images: jax.Array, config_data, pixel_max: int) -> jax.Array:
    """Augmented pixels in [0, 1] of a uint8 batch, as the data group of the config says."""
    crop_key, affine_key = jax.random.split(key)
    images = augment.augment(crop_key, images, crop_padding=config_data.crop_padding, flip=config_data.flip)
    pixels = augment.to_pixels(images, pixel_max)
    rotation, scale, shift = config_data.affine
    if rotation or scale or shift:
        pixels = augment.random_affine(affine_key, pixels, max_rotation=rotation, max_scale=scale, max_shift=shift)
    return pixels


def _finite(tree) -> jax.Array:
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def make_train_step(model, optimizer, config, mesh: Mesh, pixel_max: int):
    """The training step (state, images, labels, epsilon) -> (state, metrics).

    images: uint8 (global batch, h, w, c); labels: int32; epsilon: the training radius, pixel units. A step that meets a
    value that is not finite leaves parameters, state and optimizer as they are; metrics["finite"] says where it was.
    """
    loss_function = LOSSES[config.loss.name](config.loss)

    def step(state: TrainState, images, labels, epsilon):
        key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
        pixels = preprocess(key, images, config.data, pixel_max)
        pixels = jax.lax.with_sharding_constraint(pixels, sharding.batch_sharded(mesh))

        def objective(params):
            variables = {"params": params, COLLECTION: state.lip}
            network, advanced = model.apply(variables, True, method="build", mutable=[COLLECTION])
            vectors = state.lip["vectors"]
            lipschitz, vectors = bounds.margin_lipschitz_estimate(network, vectors, config.power_iterations)
            lip = {**advanced[COLLECTION], "vectors": vectors}
            logits = network(pixels)
            per_example = loss_function(logits, labels, lipschitz, epsilon)
            return jnp.mean(per_example), (logits, lipschitz, lip)

        (loss, (logits, lipschitz, lip)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        finite = {"loss": _finite(loss), "logits": _finite(logits), "norm estimates": _finite((lipschitz, lip))}
        finite |= {f"gradient of {name}": _finite(grads[name]) for name in grads}
        params = optax.apply_updates(state.params, updates)
        finite["updated parameters"] = _finite((params, opt_state))
        good = jnp.array(list(finite.values())).all()
        fresh = dataclasses.replace(state, params=params, lip=lip, opt_state=opt_state)
        kept = jax.tree.map(lambda new, old: new if new is old else jnp.where(good, new, old), fresh, state)
        state = dataclasses.replace(kept, step=state.step + 1)
        radii = certify.certified_radius(logits, lipschitz)
        correct = jnp.argmax(logits, axis=1) == labels
        metrics = {
            "loss": loss,
            "accuracy": jnp.mean(correct),
            "certified_accuracy_estimate": jnp.mean(correct & (radii > config.loss.epsilon)),
            "grad_norm": optax.tree.norm(grads),
            "finite": finite,
        }
        return state, metrics

    return step


def jit_array_step(step, mesh: Mesh, batch_size: int):
    """Jits a step for a data set that lives on the devices: (state, images, labels, order, start, epsilon).

    images, labels: the whole training set, replicated; order: of this epoch; start: position of the batch in it. The
    gather of a batch-sharded index from a replicated array needs no communication.
    """

    def array_step(state, images, labels, order, start, epsilon):
        index = jax.lax.dynamic_slice_in_dim(order, start, batch_size)
        index = jax.lax.with_sharding_constraint(index, sharding.batch_sharded(mesh))
        return step(state, images[index], labels[index], epsilon)

    return jax.jit(array_step, donate_argnums=0, out_shardings=sharding.replicated(mesh))


def jit_stream_step(step, mesh: Mesh):
    """Jits a step for batches from the host: (state, images, labels, epsilon), images sharded over the mesh."""
    return jax.jit(step, donate_argnums=0, out_shardings=sharding.replicated(mesh))


def make_eval_step(model, config, mesh: Mesh, pixel_max: int):
    """Two jitted functions: (params, lip) -> (network, L), and (network, L, images, labels) -> sums over the batch.

    L is an estimate. images: uint8; labels: int32, -1 for images that only fill up the batch.
    """
    everywhere = sharding.replicated(mesh)

    @functools.partial(jax.jit, out_shardings=everywhere)
    def prepare(params, lip):
        network = model.apply({"params": params, COLLECTION: lip}, method="build")
        lipschitz, _ = bounds.margin_lipschitz_estimate(network, lip["vectors"], config.power_iterations_eval)
        return network, lipschitz

    @functools.partial(jax.jit, out_shardings=everywhere)
    def evaluate(network, lipschitz, images, labels):
        logits = network(augment.to_pixels(images, pixel_max))
        correct = jnp.argmax(logits, axis=1) == labels
        radii = certify.certified_radius(logits, lipschitz)
        return {
            "accuracy": jnp.sum(correct),
            "certified_accuracy_estimate": jnp.sum(correct & (radii > config.loss.epsilon)),
            "cross_entropy": jnp.sum(jnp.where(labels >= 0, losses.cross_entropy(logits, jnp.maximum(labels, 0)), 0.0)),
        }

    return prepare, evaluate
