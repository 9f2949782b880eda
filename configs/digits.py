"""Handwritten digits inside scikit-learn (1,797 images, 8 x 8): the default config, which downloads nothing.

LiResNet (arXiv:2301.12549) with two blocks, trained by the Lipschitz margin loss (arXiv:1802.04034).
"""

from lipjax.training.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 128
    config.num_epochs = 300
    config.power_iterations = 3

    config.data.name = "digits"
    # Small and below a pixel: whole-pixel crops move an 8 x 8 digit too far.
    config.data.affine = (5.0, 0.05, 0.03)

    config.model.depth = 2
    config.model.width = 32
    # Windows that do not overlap: a quarter of the cost of a 3 x 3 stem at full size.
    config.model.stem_kernel = 2
    config.model.stem_strides = 2
    config.model.stem_padding = 0

    # The full ball for every image, certified or not. EMMA at 1.5 times the radius certified 2 % less on validation.
    config.loss.name = "margin"
    config.loss.epsilon = 0.25
    config.loss.epsilon_end = 1.0
    config.optimizer.learning_rate = 1e-2
    config.checkpoint.every_epochs = 10
    config.certify.radii = (0.1, 0.25, 0.5)
    return config.lock()
