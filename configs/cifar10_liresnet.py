"""LiResNet L12W512 (49 M parameters) on CIFAR-10, as published at NeurIPS 2023 (arXiv:2301.12549).

Run: python train.py --config=configs/cifar10_liresnet.py --workdir=DIR
Measured: never (it needs accelerators).
Published, by power iteration: 66.9 % certified at 36/255; 70.1 % with generated images, which this config does not use.
"""

from lipjax.training.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 256
    config.num_epochs = 800

    config.data.name = "cifar10"
    config.data.validation_fraction = 0.02
    config.data.crop_padding = 4
    config.data.flip = True

    config.model.depth = 12
    config.model.width = 512

    config.loss.epsilon = 36 / 255
    config.loss.epsilon_end = 1.5
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 1e-4
    config.optimizer.warmup_epochs = 20.0
    config.checkpoint.every_epochs = 5
    config.certify.radii = (36 / 255, 72 / 255, 108 / 255)
    return config.lock()
