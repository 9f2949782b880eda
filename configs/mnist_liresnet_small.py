"""LiResNet L4W32 with a contractive neck and two contractive dense layers (222,378 parameters), MNIST, for radius 1.58.

EMMA (arXiv:2301.12549) on the full radius; sizes for minutes on one core. Nothing is tuned: the first settings tried.
Run: python train.py --config=configs/mnist_liresnet_small.py --workdir=DIR --config.data.data_dir=WHERE_MNIST_LIES
Measured on all 10,000 test images: accuracy 97.16 %, proved at l2 radius 0.3 94.97 %, 1 82.57 %, 1.58 59.35 %; for the
float32 program, too, 94.95, 82.43 and 59.14 %; under attack, on 500 of them, 95.6, 87.0 and 75.2 %. Seed 0, commit
e885cb6, on one core of an AMD EPYC without AVX-512: 24 minutes of training steps, and 2 to certify and attack. The
network is in the zoo as mnist_liresnet. With 10 epochs (commit 16f0560): 96.91 %, and 94.28, 79.89 and 55.25 %.
Published for 4C3F with MinMax at 1.58, by power iteration: 62.8 % (arXiv:2102.08452, hundreds of epochs). In
the last epoch 59.8 % of the training images were certified, by estimates: it does not overfit.
"""

from lipjax.training.config import default_config


def get_config():
    config = default_config(optimizer="nadam")
    config.batch_size = 128
    config.num_epochs = 40
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
    config.certify.attack_images = 500
    config.certify.dtype = "float32"
    config.certify.radii = (0.3, 1.0, 1.58)
    return config.lock()
