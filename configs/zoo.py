"""Networks of almost orthogonal layers, convex potential layers, SDP-based layers and sandwiches, as published.

Run: python train.py --config=configs/zoo.py:aol_small --workdir=DIR
     --config=configs/zoo.py:help lists the variants. The other sizes of SLL: medium --config.model.conv_depth=30
     --config.model.dense_depth=10 --config.model.width=60, large 50, 10, 90.
Measured: never (hundreds of epochs need an accelerator). Published: accuracy, certified at 36/255, 72/255, 108/255 (and
1 for AOL), in %. [1] the authors' own README; [2] second-hand, from a survey, at 36/255 alone.

aol: arXiv:2208.03160. Sizes by the number of channels that are kept, of which their table does not say which is which.
Ours: from epoch 900 on the rate falls exponentially; theirs falls tenfold after 900, 990 and 999. Their colours are
changed at random, too.
cpl: arXiv:2110.12690. sll: arXiv:2303.03169; theirs has means of Adam of (0.5, 0.9) and a strong change of colours.
sandwich: arXiv:2301.11526. Batches of 256 and 2 % of the training images for validation are ours.
"""

from lipjax.training.config import default_config

VARIANTS = {
    "aol_small": "patchwise, 16 channels, 18.7 M parameters; published 70.3, 62.9, 55.0, 47.7, 22.3 % [1]",
    "aol_medium": "patchwise, 32 channels; published 71.3, 64.0, 56.1, 49.1, 23.3 % [1]",
    "aol_large": "patchwise, 48 channels; published 71.4, 64.1, 56.5, 49.4, 23.8 % [1]",
    "aol_conv": "convolutional, width 16, 15.2 M parameters; published 68.5, 60.2, 52.3, 45.2, 19.5 % [1]",
    "cpl": "20 convolutions and 7 dense layers, width 30; published for the largest: certified 64.4 % [2]",
    "sll_small": "20 convolutions and 7 dense layers, width 45; nothing published that we know first-hand",
    "sll_xlarge": "70 convolutions and 15 dense layers, width 120; published 73.3, 64.8 % [2]",
    "sandwich": "CIFAR-100, six convolutions and three dense layers; nothing published that we know first-hand",
}

# Model, loss and its fields, number of epochs, peak of the learning rate.
KINDS = {
    "aol": ("patchnet", "offset_cross_entropy", {}, 1000, 1e-3),
    "aol_conv": ("concatnet", "offset_cross_entropy", {}, 1000, 1e-3),
    "cpl": ("potentialnet", "multi_margin", {}, 200, 1e-3),
    "sll": ("potentialnet", "offset_cross_entropy", {"offset": 1.5 * 2**0.5}, 1000, 1e-2),
    "sandwich": ("sandwichnet", "offset_cross_entropy", {"offset": 1.5 * 2**0.5}, 100, 1e-2),
}
CHANGES = {
    "aol_small": {},
    "aol_medium": {"model.features": 32},
    "aol_large": {"model.features": 48},
    "aol_conv": {},
    "cpl": {"model.width": 30},
    "sll_small": {},
    "sll_xlarge": {"model.width": 120, "model.conv_depth": 70, "model.dense_depth": 15},
    "sandwich": {"data.name": "cifar100"},
}


def get_config(variant):
    kind = variant.partition("_")[0]
    model, loss, fields, epochs, rate = KINDS.get(variant, KINDS[kind])
    optimizer, schedule = ("sgd", "exponential") if kind == "aol" else ("adam", "triangular")
    config = default_config(model, loss, optimizer, schedule, layer=kind)
    config.num_epochs = epochs

    config.data.name = "cifar10"
    config.data.validation_fraction = 0.02
    config.data.crop_padding = 4
    config.data.flip = True

    config.model.input_mean = (0.4914, 0.4822, 0.4465)
    config.loss.update(fields)

    config.optimizer.learning_rate = rate
    config.optimizer.clip_norm = 0.0
    config.checkpoint.every_epochs = 5
    config.certify.radii = (36 / 255, 72 / 255, 108 / 255, 1.0)
    if kind == "aol":
        config.batch_size = 250
        config.model.padding = "ZERO"
        config.optimizer.weight_decay = 5e-4
        config.optimizer.decay = "weights"
        config.optimizer.decay_from = 900.0
        config.optimizer.final_fraction = 1e-3
        config.optimizer.warmup_epochs = 0.0
    else:
        config.optimizer.warmup_epochs = 0.4 * epochs
    config.update_from_flattened_dict(CHANGES[variant])
    return config.lock()
