"""LiResNet L12W512 with eight dense layers of 2048 (134 M parameters) on Tiny-ImageNet, the recipe of ICLR 2024
(arXiv:2310.02513).

Run: python train.py --config=configs/tiny_imagenet_recipe.py --workdir=DIR
We measured: not yet run. Reported, by power iteration: accuracy 48.4 %, certified at 36/255
37.0 %, 72/255 26.8 %, 108/255 18.6 %, with 768 generated images beside the 256 real ones of every step, and
RandAugment. There is no source of generated images and no RandAugment here yet.
"""

from lipjax.training.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 256
    config.num_epochs = 800
    config.power_iterations_eval = 500

    config.data.name = "tiny_imagenet"
    config.data.validation_fraction = 0.02
    config.data.crop_padding = 8
    config.data.flip = True

    config.model.depth = 12
    config.model.width = 512
    config.model.stem_kernel = 5  # 64 x 64 images to 32 x 32 maps
    config.model.stem_strides = 2
    config.model.stem_padding = 2
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
    config.certify.attack_images = 1000
    return config.lock()
