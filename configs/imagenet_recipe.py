"""LiResNet L12W588 with eight dense layers of 2048 (98 M parameters) on ImageNet (224 x 224), the recipe of ICLR 2024
(arXiv:2310.02513).

Run: python train.py --config=configs/imagenet_recipe.py --workdir=DIR --config.data.data_dir=WHERE_TFDS_PREPARED_IT
Measured: never.
Published for a net that is called L12W512, whose config says width 588, by power iteration: accuracy 49.0 %, certified
at 36/255 38.3 %, with generated images, whose use the published code for ImageNet does not show; none are used here.
RandAugment treats every image, as there, but after the crop to 224 x 224 and not before it. A part of the training
images is held out here for validation.
"""

from lipjax.training.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 256
    config.num_epochs = 400
    config.power_iterations_eval = 500

    config.data.name = "imagenet"
    config.data.validation_fraction = 0.01
    config.data.flip = True
    config.data.randaugment.probability = 1.0

    config.model.depth = 12
    config.model.width = 588
    config.model.stem_kernel = 14  # patches of 14 x 14 pixels to 16 x 16 maps
    config.model.stem_strides = 14
    config.model.stem_padding = 0
    config.model.neck = "cholesky"
    config.model.neck_features = 2048
    config.model.dense_depth = 8
    config.model.centering = True
    config.model.small_init = True

    config.loss.epsilon = 36 / 255
    config.loss.epsilon_end = 2.0
    config.optimizer.name = "nadam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.lookahead_period = 6
    config.optimizer.warmup_epochs = 20.0
    config.checkpoint.every_steps = 500
    config.certify.radii = (36 / 255, 72 / 255, 108 / 255)
    config.certify.num_images = 5000
    config.certify.attack_images = 500
    return config.lock()
