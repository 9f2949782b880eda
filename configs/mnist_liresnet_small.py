"""LiResNet L4W32 with a contractive neck and two contractive dense layers (222,378 parameters), MNIST, for radius 1.58.

EMMA (arXiv:2301.12549) on the full radius; sizes for minutes on one core. Nothing is tuned: the first settings tried.
Run: python train.py --config=configs/mnist_liresnet_small.py --workdir=DIR --config.data.data_dir=WHERE_MNIST_LIES
Measured on all 10,000 test images: accuracy 96.91 %, proved at l2 radius 0.3 94.28 %, 1 79.89 %, 1.58 55.25 %; for the
float32 program, too, 94.24, 79.71 and 54.89 %; under attack, on 1,000 of them, 94.8, 84.4 and 70.2 %. Seed 0, commit
16f0560, 350 s of processor time with certification and attack, on two cores of an AMD EPYC that did other work besides.
The network is in the zoo as mnist_liresnet. Published for 4C3F with MinMax at 1.58, by power iteration: 62.8 %
(arXiv:2102.08452, hundreds of epochs). The estimate on validation images still rose by 4 points an epoch at the end:
more epochs will give more, and have not been tried.
"""

from lipjax.training.config import default_config


def get_config():
    config = default_config(optimizer="nadam")
    config.batch_size = 128
    config.num_epochs = 10
    config.power_iterations = 3

    config.data.name = "mnist"
    config.data.validation_fraction = 0.02

    config.model.depth = 4
    config.model.width = 32
    config.model.stem_kernel = 6  # to maps of 8 x 8, all of which the neck sees
    config.model.stem_strides = 4
    config.model.stem_padding = 3
    config.model.neck = "cholesky"
    config.model.neck_features = 256
    config.model.dense_depth = 2

    config.loss.epsilon = 1.58
    config.loss.epsilon_end = 1.1
    config.optimizer.learning_rate = 2e-3
    config.certify.attack_images = 1000
    config.certify.dtype = "float32"
    config.certify.radii = (0.3, 1.0, 1.58)
    return config.lock()
