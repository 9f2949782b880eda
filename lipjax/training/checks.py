"""Checks of a run: parts of a config that do not fit each other."""

import jax
from jax.sharding import Mesh

from lipjax import bounds
from lipjax.errors import UserError
from lipjax.nn import COLLECTION
from lipjax.training import randaugment
from lipjax.training.data import StreamDataset, num_generated
from lipjax.training.objective import LOSSES


def check_vectors(model, state) -> None:
    """Raises: UserError if norms are estimated in training steps that are not in validation, or of other shapes."""

    def wanted(variables):
        network, _ = model.apply(variables, True, method="build", mutable=[COLLECTION])
        return bounds.init_vectors(network, jax.random.key(0))

    found = state.lip["vectors"]
    asked = jax.eval_shape(wanted, {"params": state.params, COLLECTION: state.lip})
    other = [name for name, v in asked.items() if name not in found or found[name].shape != v.shape]
    if other:
        raise UserError(
            f"config.model: the norms of {', '.join(other[:4])} would be estimated in training steps, but not alike in "
            'validation. Set config.model.form to "response", or config.model.train_terms and eval_terms to None.'
        )


def check_loss(config, model) -> None:
    """Raises: UserError for a loss that is for MLP heads, and a model with another one."""
    if LOSSES[config.name].needs_mlp and getattr(model, "head", None) != "mlp":
        raise UserError(
            f'config.loss.name "{config.name}" is for models with config.model.head = "mlp": choose another.'
        )


def check_class_weights(config, dataset) -> None:
    """Raises: UserError for class weights where it is not known how often the classes occur."""
    if config.loss.class_weights == "none":
        return
    what = f'config.loss.class_weights "{config.loss.class_weights}" counts the labels of the training images, '
    if isinstance(dataset, StreamDataset):
        raise UserError(f'{what}and {dataset.name} is streamed, its labels never read at once: set it to "none".')
    if num_generated(config):
        raise UserError(
            f"{what}and would count generated images by how often their class occurs among the real ones: set it to "
            '"none", or config.data.generated.path to "".'
        )


def check_augmentation(config, dataset, mesh: Mesh) -> None:
    """Raises: UserError for images that RandAugment is not for, and for a batch whose parts do not divide."""
    if config.data.randaugment.probability > 0 and (
        dataset.pixel_max != 255 or dataset.image_shape[2] not in randaugment.CHANNELS
    ):
        raise UserError(
            "config.data.randaugment.probability: RandAugment is for values 0 … 255 in "
            f"{' or '.join(map(str, randaugment.CHANNELS))} channels, and {dataset.name} has 0 … {dataset.pixel_max} "
            f"in {dataset.image_shape[2]}: set it to 0."
        )
    generated = num_generated(config)
    if generated % mesh.size:
        raise UserError(
            f"config.data.generated.per_batch = {generated} does not divide over {mesh.size} devices, as both the "
            "generated and the real images of a batch must: change it, or config.mesh."
        )
