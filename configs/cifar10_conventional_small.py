"""Conventional residual blocks, x + MaxMin(convolution of x), in place of the linear ones of cifar10_liresnet_small.py.

The comparison of arXiv:2301.12549: all else is that config's (sizes, 557,386 parameters, epochs, loss, optimiser). The
bound of such a block is 1 + the norm of its convolution, that of a linear one the norm of identity + convolution.
Run: python train.py --config=configs/cifar10_conventional_small.py --workdir=DIR --config.num_epochs=16
Measured: never. Compare with cifar10_liresnet_small.py after as many epochs.
"""

from lipjax.training.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 128
    config.num_epochs = 30
    config.power_iterations = 3

    config.data.name = "cifar10"
    config.data.validation_fraction = 0.02
    config.data.crop_padding = 4
    config.data.flip = True

    config.model.depth = 6
    config.model.width = 64
    config.model.block = "conventional"

    config.loss.epsilon = 36 / 255
    config.optimizer.name = "nadamw"
    config.optimizer.learning_rate = 2e-3
    config.checkpoint.every_steps = 100
    config.certify.attack_images = 1000
    config.certify.attack_steps = 20
    config.certify.radii = (36 / 255, 72 / 255, 108 / 255)
    return config.lock()
