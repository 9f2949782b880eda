"""Baselines that the small LiResNets on CIFAR-10 are compared with: docs/bound_quality.md.

Run: python train.py --config=configs/baselines.py:conventional --workdir=DIR --config.num_epochs=16
     python train.py --config=configs/baselines.py:unconstrained --workdir=DIR
Measured: never.

conventional: the comparison of arXiv:2301.12549: all else is as in cifar10_liresnet_small.py (sizes, 557,386
parameters, epochs, loss, optimiser). The bound of such a block is 1 + the norm of its convolution, that of a linear one
the norm of identity + convolution. Compare after as many epochs.

unconstrained: nothing holds the norms, so that the proved radii should be next to nothing. Not the same net as the
recipe's: the neck is free, the four dense layers are left out (557,386 parameters instead of 821,514), and so is the
normalisation of the head. Not selected on a validation split, whose measure is certified accuracy: the last checkpoint
counts, and all training images are used.
"""

from lipjax.training.config import default_config

VARIANTS = {
    "conventional": "x + MaxMin(convolution of x) in the place of the linear blocks of cifar10_liresnet_small",
    "unconstrained": "the residual blocks of cifar10_recipe_small, trained by cross-entropy alone",
}

CHOICES = {
    "conventional": {"optimizer": "nadamw"},
    "unconstrained": {"loss": "cross_entropy", "optimizer": "nadam"},
}
CHANGES = {
    "conventional": {"data.validation_fraction": 0.02, "model.block": "conventional"},
    "unconstrained": {
        "data.validation_fraction": 0.0,
        "model.head_normalize": False,
        "model.neck_features": 256,
        "model.centering": True,
        "model.small_init": True,
        "optimizer.lookahead_period": 6,
    },
}


def get_config(variant):
    config = default_config(**CHOICES[variant])
    config.batch_size = 128
    config.num_epochs = 30
    config.power_iterations = 3

    config.data.name = "cifar10"
    config.data.crop_padding = 4
    config.data.flip = True

    config.model.depth = 6
    config.model.width = 64

    config.optimizer.learning_rate = 2e-3
    config.checkpoint.every_steps = 100
    config.certify.attack_images = 1000
    config.update_from_flattened_dict(CHANGES[variant])
    return config.lock()
