"""LiResNets by the recipe of ICLR 2024 (arXiv:2310.02513), eight dense layers of 2048, and siblings for two CPU cores.

Run: python train.py --config=configs/recipe.py:cifar10 --workdir=DIR
     --config=configs/recipe.py:help lists the variants. ImageNet: --config.data.data_dir=WHERE_TFDS_PREPARED_IT
Measured: never; cifar10_recipe_small.py was. The published numbers are by power iteration, in this order: accuracy,
certified at 36/255, 72/255, 108/255. A part of the training images is held out here for validation.

On disk, for CIFAR and Tiny-ImageNet: the prepared data set, and generated images for it in generated/<data set>.npz, or
wherever --config.data.generated.path says (docs/data.md). Every step takes 768 of them beside 256 real ones; an epoch
is one pass over the real ones. Without them: --config.data.generated.path= --config.batch_size=256

ImageNet: the published numbers are for a net that is called L12W512, whose config says width 588, with generated
images, whose use the published code for ImageNet does not show; none are used here. RandAugment treats every image, as
there, but after the crop to 224 x 224 and not before it.

Small: L6W64 with four dense layers of 256, without generated images and RandAugment. Batch, learning rate, warm-up and
power iterations are smaller or shorter than the recipe's, our choice and not tuned.
"""

from lipjax.training.config import default_config

VARIANTS = {
    "cifar10": "L12W512, 83 M parameters; published 87.0, 78.1, 66.6, 53.5 %",
    "cifar100": "L12W512, 83 M parameters; published 62.1, 50.1, 38.5, 29.0 %",
    "tiny_imagenet": "L12W512, 134 M parameters; published 48.4, 37.0, 26.8, 18.6 %",
    "imagenet": "L12W588, 98 M parameters, 224 x 224; published 49.0, 38.3 %",
    "cifar100,small": "L6W64, 844,644 parameters",
    "tiny_imagenet,small": "L6W64, 874,952 parameters; the stem is that of the net of 2023",
    "imagenet,small": "L6W64, 1,074,216 parameters, at 64 x 64; the stem takes patches of 4 x 4",
}

STEM_14 = {"model.stem_kernel": 14, "model.stem_strides": 14, "model.stem_padding": 0}  # 224 x 224 to 16 x 16 maps
STEM_7 = {"model.stem_kernel": 7, "model.stem_strides": 4, "model.stem_padding": 3}  # 64 x 64 images to 16 x 16 maps
STEM_4 = {"model.stem_kernel": 4, "model.stem_strides": 4, "model.stem_padding": 0}  # patches of 4 x 4, the same maps

# What a data set changes, in both sizes.
DATA = {
    "cifar10": {"data.crop_padding": 4},
    "cifar100": {"data.crop_padding": 4},
    "tiny_imagenet": {"data.crop_padding": 8, "certify.attack_images": 1000},
    "imagenet": {"data.validation_fraction": 0.01, "loss.epsilon_end": 2.0},
}

# And in one of them. Of 1024 images 256 are real and 768 generated.
WITH_GENERATED = {
    "batch_size": 1024,
    "num_epochs": 800,
    "data.randaugment.probability": 0.5,
    "data.generated.per_batch": 768,
    "checkpoint.every_epochs": 5,
}
LARGE = {
    "cifar10": WITH_GENERATED | {"data.generated.crop_padding": 2},
    "cifar100": WITH_GENERATED | {"data.generated.crop_padding": 2},
    "tiny_imagenet": WITH_GENERATED | {"data.generated.crop_padding": 4},  # 64 x 64 images to 32 x 32 maps
    "imagenet": STEM_14
    | {
        "num_epochs": 400,
        "data.randaugment.probability": 1.0,
        "model.width": 588,
        "checkpoint.every_steps": 500,
        "certify.num_images": 5000,
        "certify.attack_images": 500,
    },
}
SMALL = {
    "cifar100": {},
    "tiny_imagenet": STEM_7,
    "imagenet": STEM_4
    | {"num_epochs": 10, "data.image_size": 64, "certify.num_images": 1000, "certify.attack_images": 200},
}


def get_config(variant):
    name, _, size = variant.partition(",")
    config = default_config(optimizer="nadam")
    config.data.name = name
    config.data.validation_fraction = 0.02
    config.data.flip = True

    config.model.neck = "cholesky"
    config.model.centering = True
    config.model.small_init = True
    config.optimizer.lookahead_period = 6

    if size == "small":
        config.batch_size = 128
        config.num_epochs = 30
        config.power_iterations = 3
        config.model.depth = 6
        config.model.width = 64
        config.model.neck_features = 256
        config.model.dense_depth = 4
        config.optimizer.learning_rate = 2e-3
        config.checkpoint.every_steps = 100
        config.certify.attack_images = 1000
    else:
        config.power_iterations_eval = 500
        config.model.neck_features = 2048
        config.model.dense_depth = 8
        config.optimizer.warmup_epochs = 20.0
        if name != "imagenet":
            config.data.generated.path = f"generated/{name}.npz"
    config.update_from_flattened_dict(DATA[name] | (SMALL if size == "small" else LARGE)[name])
    return config.lock()
