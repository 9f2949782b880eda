"""LiResNet L6W64 (557,386 parameters) on CIFAR-10, for two CPU cores (arXiv:2301.12549).

Run: python train.py --config=configs/cifar10_liresnet_small.py --workdir=DIR --config.num_epochs=16
Measured, after 16 epochs, on all 10,000 test images: accuracy 58.39 %, proved at l2 radius 36/255 50.15 %, 72/255 41.82
%, 108/255 33.98 %; under attack, on the first 1,000, 57.3, 49.7 and 45.3 %. Seed 0, trained at commit 0d6d036 and
certified at 64babac, on two cores of an AMD EPYC that did other work besides: 80 minutes, and 6 to certify and attack.
The 30 epochs set below have not been run; they take about 2.5 hours on two such cores.
"""

from lipjax.training.config import default_config


def get_config():
    config = default_config(optimizer="nadamw")
    config.batch_size = 128
    config.num_epochs = 30
    config.power_iterations = 3

    config.data.name = "cifar10"
    config.data.validation_fraction = 0.02
    config.data.crop_padding = 4
    config.data.flip = True

    config.model.depth = 6
    config.model.width = 64

    config.optimizer.learning_rate = 2e-3
    config.checkpoint.every_steps = 100
    config.certify.attack_images = 1000
    return config.lock()
