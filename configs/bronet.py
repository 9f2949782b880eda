"""BRONets (arXiv:2505.15174): LiResNets with block reflectors, trained by logit annealing.

Run: python train.py --config=configs/bronet.py:cifar10 --workdir=DIR
     --config=configs/bronet.py:help lists the variants. ImageNet: --config.data.data_dir=WHERE_TFDS_PREPARED_IT
Measured: never (800 epochs need accelerators). Published: accuracy, certified at 36/255, 72/255, 108/255, as the
authors stated them in their public review of 3 April 2025, without generated images; their constants of the stem are
those of 500 power iterations. CIFAR-10 with generated images: 87.2, 78.3, 67.4, 54.5 % (theirs as well).
"""

from lipjax.training.config import default_config

VARIANTS = {
    "cifar10": "12 reflectors of width 512, 68.8 M parameters; published 81.6, 70.6, 57.2, 42.5 %",
    "cifar100": "the same; published 54.3, 40.2, 29.1, 20.3 %",
    "tiny_imagenet": "6 reflectors of width 512 and rank 64, dense reflectors; published 41.2, 29.0, 19.0, 12.1 %",
    "imagenet": "6 residual blocks and 8 uncropped reflectors of width 588; published 49.3, 37.6, 27.9, 19.6 %",
}

CHANGES = {
    "cifar10": {"data.crop_padding": 4},
    "cifar100": {"data.crop_padding": 4},
    "tiny_imagenet": {
        "data.crop_padding": 8,
        "model.depth": 6,
        "model.rank": 0.125,
        "model.neck": "bro",
        "model.dense": "bro",
        "model.dense_depth": 4,
        "model.dense_rank": 0.125,
        "certify.attack_images": 1000,
    },
    "imagenet": {
        "batch_size": 1024,
        "num_epochs": 400,
        "data.validation_fraction": 0.01,
        "model.depth": 8,
        "model.width": 588,
        "model.residual_depth": 6,
        "model.crop": False,
        "model.stem_kernel": 14,  # patches of 14 x 14 pixels to 16 x 16 maps, which the reflectors make 32 x 32
        "model.stem_strides": 14,
        "model.stem_padding": 0,
        "model.neck": "norm",
        "model.neck_patch": 8,
        "loss.epsilon_end": 2.0,
        "optimizer.weight_decay": 0.0,
        "checkpoint.every_epochs": 1,
        "checkpoint.every_steps": 500,
        "certify.num_images": 5000,
        "certify.attack_images": 500,
    },
}


def get_config(variant):
    config = default_config("bronet", "logit_annealing", "nadam")
    config.num_epochs = 800
    config.power_iterations_eval = 500

    config.data.name = variant
    config.data.validation_fraction = 0.02
    config.data.flip = True

    config.optimizer.weight_decay = 4e-5
    config.optimizer.warmup_epochs = 20.0
    config.optimizer.lookahead_period = 6
    config.checkpoint.every_epochs = 5
    config.update_from_flattened_dict(CHANGES[variant])
    return config.lock()
