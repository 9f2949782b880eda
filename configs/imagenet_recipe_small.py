"""LiResNet L6W64 with four dense layers of 256 (1,074,216 parameters) on ImageNet at 64 x 64, for two CPU cores: the
recipe of ICLR 2024 (arXiv:2310.02513) without generated images and RandAugment.
Batch, learning rate, warm-up and power iterations are smaller or shorter than the recipe's, our choice and not tuned.
The stem takes patches of 4 x 4.

Run: python train.py --config=configs/imagenet_recipe_small.py --workdir=DIR --config.data.data_dir=WHERE_TFDS_IS
Measured: never.
"""

from lipjax.training.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 128
    config.num_epochs = 10
    config.power_iterations = 3

    config.data.name = "imagenet"
    config.data.validation_fraction = 0.01
    config.data.image_size = 64
    config.data.flip = True

    config.model.depth = 6
    config.model.width = 64
    config.model.stem_kernel = 4  # patches of 4 x 4 pixels to 16 x 16 maps
    config.model.stem_strides = 4
    config.model.stem_padding = 0
    config.model.neck = "cholesky"
    config.model.neck_features = 256
    config.model.dense_depth = 4
    config.model.centering = True
    config.model.small_init = True

    config.loss.epsilon = 36 / 255
    config.loss.epsilon_end = 2.0
    config.optimizer.name = "nadam"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.lookahead_period = 6
    config.optimizer.warmup_epochs = 1.0
    config.checkpoint.every_steps = 100
    config.certify.radii = (36 / 255, 72 / 255, 108 / 255)
    config.certify.num_images = 1000
    config.certify.attack_images = 200
    config.certify.attack_steps = 20
    return config.lock()
