"""LipNeXt-style networks of the published sizes (arXiv:2601.18513; LxWy: x blocks of y channels).

Run: python train.py --config=configs/lipnext.py:cifar10 --workdir=DIR
     --config=configs/lipnext.py:help lists the variants. ImageNet: --config.data.data_dir=WHERE_TFDS_PREPARED_IT
Measured: never (it needs accelerators).

No code is public, and the figures below are SECOND-HAND: from notes of others, in this order: accuracy, certified at
36/255, 72/255, 108/255, without generated images. Known are the sizes, l2 pooling before the head, EMMA, bfloat16 and
an optimizer on the manifold; patches, shifts of 1/16, the recipe (that of arXiv:2310.02513) and all else are our choice
(docs/lipnext.md).
"""

from lipjax.training.config import default_config

VARIANTS = {
    "cifar10": "L32W1024, 67 M parameters; second-hand 81.5, 71.2, 59.2, 45.9 %",
    "cifar10,large": "L32W2048, 268 M parameters; second-hand 85.0, 73.2, 58.8, 43.3 %",
    "cifar100": "L32W2048, 268 M parameters; second-hand 57.4, 44.1, 31.9, 22.2 %",
    "tiny_imagenet": "L32W2048, 268 M parameters, 64 x 64; second-hand 45.5, 35.0, 25.9, 18.0 %",
    "imagenet": "L32W4096, 1.1 billion parameters, 224 x 224; second-hand 55.9, 40.3 %",
    "imagenet,deep": "L64W2896, 1.1 billion parameters, 224 x 224",
}

WIDTHS = {"cifar10": 1024, "cifar10,large": 2048, "cifar100": 2048, "tiny_imagenet": 2048, "imagenet": 4096}


def get_config(variant):
    name, _, size = variant.partition(",")
    config = default_config(model="lipnext", optimizer="manifold_adam")
    config.precision = "bfloat16"
    config.scan = True
    config.data.name = name
    config.data.validation_fraction = 0.02
    config.data.flip = True
    config.data.randaugment.probability = 0.5

    config.model.tokens = 16  # patches of 2 x 2 pixels for CIFAR, 4 x 4 for Tiny-ImageNet, 14 x 14 for ImageNet
    config.model.width = WIDTHS.get(variant, 2896)
    config.model.depth = 64 if size == "deep" else 32
    config.model.orthogonal = "manifold"
    config.model.neck = "l2"
    config.model.logit_scale = 2.0

    config.optimizer.others = "nadam"
    config.optimizer.warmup_epochs = 20.0
    config.optimizer.lookahead_period = 6
    config.num_epochs = 800
    config.checkpoint.every_epochs = 5
    if name == "imagenet":
        config.num_epochs = 400
        config.data.validation_fraction = 0.01
        config.data.randaugment.probability = 1.0
        config.loss.epsilon_end = 2.0
        config.checkpoint.every_epochs = 1
        config.checkpoint.every_steps = 500
        config.certify.num_images = 5000
        config.certify.attack_images = 500
    else:
        config.data.crop_padding = 8 if name == "tiny_imagenet" else 4
    return config.lock()
