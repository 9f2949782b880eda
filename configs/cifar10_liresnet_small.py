"""LiResNet L6W64 (0.55 M parameters) on CIFAR-10, for two CPU cores."""

from lipjax.training.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 128
    config.num_epochs = 16
    config.power_iterations = 3

    config.data.name = "cifar10"
    config.data.validation_fraction = 0.02
    config.data.crop_padding = 4
    config.data.flip = True

    config.model.depth = 6
    config.model.width = 64

    config.loss.epsilon = 36 / 255
    config.optimizer.name = "nadamw"
    config.optimizer.learning_rate = 2e-3
    config.checkpoint.every_steps = 100
    config.certify.attack_images = 1000
    config.certify.attack_steps = 20
    config.certify.radii = (36 / 255, 72 / 255, 108 / 255)
    return config.lock()
