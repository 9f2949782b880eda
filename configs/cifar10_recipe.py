"""LiResNet L12W512 with eight dense layers of 2048 (83 M parameters) on CIFAR-10, the recipe of ICLR 2024
(arXiv:2310.02513).

Run: python train.py --config=configs/cifar10_recipe.py --workdir=DIR
Measured: never.
Published, by power iteration: accuracy 87.0 %, certified at 36/255 78.1 %, 72/255 66.6 %, 108/255 53.5 %. A part of the
training images is held out here for validation.
On disk: the prepared data set, and generated images for it in generated/cifar10.npz, or wherever
--config.data.generated.path says (docs/data.md). Every step takes 768 of them beside 256 real ones; an epoch is one
pass over the real ones. Without them: --config.data.generated.path= --config.batch_size=256
"""

from lipjax.training.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 1024  # 256 real and 768 generated images
    config.num_epochs = 800
    config.power_iterations_eval = 500

    config.data.name = "cifar10"
    config.data.validation_fraction = 0.02
    config.data.crop_padding = 4
    config.data.flip = True
    config.data.randaugment.probability = 0.5
    config.data.generated.path = "generated/cifar10.npz"
    config.data.generated.per_batch = 768
    config.data.generated.crop_padding = 2

    config.model.depth = 12
    config.model.width = 512
    config.model.neck = "cholesky"
    config.model.neck_features = 2048
    config.model.dense_depth = 8
    config.model.centering = True
    config.model.small_init = True

    config.loss.epsilon = 36 / 255
    config.loss.epsilon_end = 3.0
    config.optimizer.name = "nadam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.lookahead_period = 6
    config.optimizer.warmup_epochs = 20.0
    config.checkpoint.every_epochs = 5
    config.certify.radii = (36 / 255, 72 / 255, 108 / 255)
    return config.lock()
