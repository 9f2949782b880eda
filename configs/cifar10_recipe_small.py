"""LiResNet L6W64 with four dense layers of 256 (821,514 parameters) on CIFAR-10, for two CPU cores: the
recipe of ICLR 2024 (arXiv:2310.02513) without generated images and RandAugment.
Batch, learning rate, warm-up and power iterations are smaller or shorter than the recipe's, our choice and not tuned.

Run: python train.py --config=configs/cifar10_recipe_small.py --workdir=DIR
Measured on all 10,000 test images: accuracy 66.64 %, proved at l2 radius 36/255 57.07 %, 72/255 47.13 %, 108/255
37.24 %, 255/255 9.33 %; under attack, on the first 1,000, 63.6, 57.1 and 51.1 %. Seed 0, commit eca4691, two cores of
an AMD EPYC with XLA_FLAGS=--xla_force_host_platform_device_count=2: 99 minutes beside other work (73 if quiet), and 16
to certify and attack.
Published for this net after as many epochs, trained otherwise, by a fork of the original, by power iteration: accuracy
59.98 %, certified at 36/255 50.97 %, 72/255 42.94 %, 108/255 34.88 %.
"""

from lipjax.training.config import default_config


def get_config():
    config = default_config(optimizer="nadam")
    config.batch_size = 128
    config.num_epochs = 30
    config.power_iterations = 3

    config.data.name = "cifar10"
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

    config.optimizer.learning_rate = 2e-3
    config.optimizer.lookahead_period = 6
    config.checkpoint.every_steps = 100
    config.certify.attack_images = 1000
    return config.lock()
