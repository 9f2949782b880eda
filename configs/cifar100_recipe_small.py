"""LiResNet L6W64 with four dense layers of 256 (844,644 parameters) on CIFAR-100, for two CPU cores: the
recipe of ICLR 2024 (arXiv:2310.02513) without generated images and RandAugment.
Batch, learning rate, warm-up and power iterations are smaller or shorter than the recipe's, our choice and not tuned.

Run: python train.py --config=configs/cifar100_recipe_small.py --workdir=DIR
Measured: never.
"""

from lipjax.training.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 128
    config.num_epochs = 30
    config.power_iterations = 3

    config.data.name = "cifar100"
    config.data.validation_fraction = 0.02
    config.data.crop_padding = 4
    config.data.flip = True

    config.model.depth = 6
    config.model.width = 64
    config.model.neck = "cholesky"
    config.model.neck_features = 256
    config.model.dense_depth = 4
    config.model.centering = True
    config.model.small_init = True

    config.loss.epsilon = 36 / 255
    config.loss.epsilon_end = 3.0
    config.optimizer.name = "nadam"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.lookahead_period = 6
    config.optimizer.warmup_epochs = 1.0
    config.checkpoint.every_steps = 100
    config.certify.radii = (36 / 255, 72 / 255, 108 / 255)
    config.certify.attack_images = 1000
    config.certify.attack_steps = 20
    return config.lock()
