"""LiResNets as published at NeurIPS 2023 (arXiv:2301.12549): L12W512 (49 M parameters), and L18W588 on ImageNet.

Run: python train.py --config=configs/liresnet.py:cifar10 --workdir=DIR
     --config=configs/liresnet.py:help lists the variants. ImageNet: --config.data.data_dir=WHERE_TFDS_PREPARED_IT
Measured: never (it needs accelerators). The published numbers are by power iteration.
"""

from lipjax.training.config import default_config

VARIANTS = {
    "cifar10": "published 66.9 % certified at 36/255; 70.1 % with generated images, which are not used here",
    "cifar100": "published 41.5 % certified at 36/255 with generated images, which are not used here",
    "tiny_imagenet": "64 x 64, 200 classes; published 33.6 % certified at 36/255 with generated images, not used here",
    "imagenet": "224 x 224; the authors report 14.2 % certified at radius 1",
}

CIFAR = {
    "num_epochs": 800,
    "data.validation_fraction": 0.02,
    "data.crop_padding": 4,
    "optimizer.weight_decay": 1e-4,
    "checkpoint.every_epochs": 5,
}
CHANGES = {
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "tiny_imagenet": CIFAR
    | {
        "data.crop_padding": 8,
        "model.stem_kernel": 7,  # 64 x 64 images to 16 x 16 maps
        "model.stem_strides": 4,
        "model.stem_padding": 3,
        "certify.attack_images": 1000,
    },
    "imagenet": {
        "batch_size": 1024,
        "num_epochs": 400,
        "data.validation_fraction": 0.01,
        "model.depth": 18,
        "model.width": 588,
        "model.stem_kernel": 14,  # patches of 14 x 14 pixels to 16 x 16 maps
        "model.stem_strides": 14,
        "model.stem_padding": 0,
        "model.neck_features": 2048,
        "loss.epsilon": 1.0,
        "checkpoint.every_steps": 500,
        "certify.radii": (36 / 255, 108 / 255, 1.0),
        "certify.num_images": 5000,
        "certify.attack_images": 500,
    },
}


def get_config(variant):
    config = default_config()
    config.data.name = variant
    config.data.flip = True
    config.loss.epsilon_end = 1.5
    config.optimizer.warmup_epochs = 20.0
    config.update_from_flattened_dict(CHANGES[variant])
    return config.lock()
