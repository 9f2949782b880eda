"""Handwritten digits that ship inside scikit-learn (1,797 images, 8 x 8): the default, no download."""

from lipjax.training.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 128
    config.num_epochs = 60
    config.power_iterations = 3

    config.data.name = "digits"
    config.data.crop_padding = 1

    config.model.depth = 4
    config.model.width = 32
    config.model.stem_kernel = 3
    config.model.stem_strides = 1
    config.model.stem_padding = 1

    config.loss.epsilon = 0.25
    config.loss.epsilon_end = 2.0
    config.optimizer.learning_rate = 5e-3
    config.certify.radii = (0.1, 0.25, 0.5)
    return config.lock()
