"""The residual blocks of cifar10_recipe_small.py, trained by cross-entropy alone, on CIFAR-10.

Nothing holds the norms here, so that the proved radii should be next to nothing. Not the same net as the recipe's: the
neck is free, the four dense layers are left out (557,386 parameters instead of 821,514), and so is the normalisation of
the head. Not selected on a validation split, whose measure is certified accuracy: the last checkpoint counts, and all
training images are used.
Run: python train.py --config=configs/cifar10_unconstrained_small.py --workdir=DIR
Measured: never.
"""

from lipjax.training.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 128
    config.num_epochs = 30
    config.power_iterations = 3

    config.data.name = "cifar10"
    config.data.validation_fraction = 0.0
    config.data.crop_padding = 4
    config.data.flip = True

    config.model.depth = 6
    config.model.width = 64
    config.model.head_normalize = False
    config.model.neck_features = 256
    config.model.centering = True
    config.model.small_init = True

    config.loss.name = "cross_entropy"
    config.optimizer.name = "nadam"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.lookahead_period = 6
    config.optimizer.warmup_epochs = 1.0
    config.checkpoint.every_steps = 100
    config.certify.radii = (36 / 255, 72 / 255, 108 / 255)
    config.certify.attack_images = 1000
    config.certify.attack_steps = 20
    return config.lock()
