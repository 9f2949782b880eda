"""LiResNet L18W588 on ImageNet (224 x 224), as published at NeurIPS 2023 (arXiv:2301.12549).

Run: python train.py --config=configs/imagenet_liresnet.py --workdir=DIR --config.data.data_dir=WHERE_TFDS_PREPARED_IT
Measured: never (it needs accelerators).
Published: the authors report 14.2 % certified at radius 1 for this net, by power iteration.
"""

from lipjax.training.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 1024
    config.num_epochs = 400

    config.data.name = "imagenet"
    config.data.validation_fraction = 0.01
    config.data.flip = True

    config.model.depth = 18
    config.model.width = 588
    config.model.stem_kernel = 14  # patches of 14 x 14 pixels to 16 x 16 maps
    config.model.stem_strides = 14
    config.model.stem_padding = 0
    config.model.neck_features = 2048

    config.loss.epsilon = 1.0
    config.loss.epsilon_end = 1.5
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_epochs = 20.0
    config.checkpoint.every_steps = 500
    config.certify.radii = (36 / 255, 108 / 255, 1.0)
    config.certify.num_images = 5000
    config.certify.attack_images = 500
    return config.lock()
