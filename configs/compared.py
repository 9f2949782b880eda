"""The network in which 1-Lipschitz layers were compared at equal time (arXiv:2311.16833), CIFAR-10.

Run: python train.py --config=configs/compared.py:xs --workdir=DIR
     --config=configs/compared.py:help lists the variants. Any other layer in any size: --config.model.layer=rko
Measured: never (24 hours of a GPU each). Published, by the authors' logs of those runs, on the test set: accuracy,
certified at 36/255, 72/255, 108/255, 1 in %, [epochs]. Their certificates take every layer's norm to be 1, also where
that is known by power iteration only (CPL).

            XS                         S                          M                          L
    AOL     71.7/59.1/45.2/32.4/3.9    73.6/60.8/46.5/34.3/4.4    73.4/61.0/47.1/34.6/4.9    73.7/61.5/48.0/35.8/5.3
    BCOP    71.7/58.5/44.1/31.3/3.0    73.1/59.3/44.8/31.7/2.8    74.0/60.5/45.7/32.2/3.4    74.6/61.5/46.4/33.2/3.5
    CPL     74.9/62.5/48.5/35.2/4.2    76.1/64.2/50.4/36.9/4.8    76.7/65.1/51.5/38.1/5.5    76.8/65.2/51.8/37.7/5.4
    Cayley  73.1/59.5/45.2/31.9/3.0    74.2/61.1/46.3/32.8/3.3    74.3/61.0/46.3/33.0/3.2    -
    LOT     75.5/63.5/49.2/36.1/4.3    76.7/64.6/50.6/37.5/4.8    72.0/58.7/43.7/30.9/2.8    -
    SLL     73.7/61.0/46.8/34.4/4.2    74.2/62.0/47.7/35.2/4.5    75.3/62.8/48.9/35.8/4.8    74.3/62.3/48.1/35.1/4.6
    SOC     74.1/61.3/47.8/34.7/4.1    75.0/62.9/48.8/35.6/4.4    76.9/66.3/53.4/40.0/6.7    76.9/65.4/51.9/38.8/5.9
    CPL, 1x1, XS: 72.0/59.1/45.4/33.2/4.1

Learning rate, weight decay and epochs of the variants with a layer's name are those of that layer's published run for
XS (3x3), which were drawn at random and selected; the other variants have those of SOC's. Layers that were not in
that comparison take those of one that was: soc_frequency SOC's, aoc BCOP's, bro LOT's, cholesky and sandwich Cayley's,
plain SOC's; n_activation is AOC with learned activations in the place of MaxMin. Ours: a linear warm-up of 30 % of the
epochs in the place of their one-cycle schedule's, crops and flips, and 2 % of the training images for validation.
"""

from lipjax.training.config import default_config

WIDTHS = {"xs": 16, "s": 32, "m": 64, "l": 128}
# Learning rate, weight decay, epochs.
RUNS = {
    "aol": (0.0573, 3.68e-5, 10044),
    "bcop": (0.00652, 2.56e-4, 1524),
    "cpl": (0.0343, 1.27e-4, 10032),
    "cayley": (0.0174, 2.35e-5, 4272),
    "lot": (0.0829, 4.09e-6, 2664),
    "sll": (0.0907, 1.99e-5, 8820),
    "soc": (0.0508, 7.23e-6, 4452),
}
# Layers that were not in that comparison, and whose rates they take.
ALIKE = {"soc_frequency": "soc", "aoc": "bcop", "bro": "lot"} | dict.fromkeys(("cholesky", "sandwich"), "cayley")
ALIKE["plain"] = "soc"
LAYERS = (*RUNS, *ALIKE)
ACTIVATIONS = {"n_activation": "aoc"}
MILLIONS = {3: (1.57, 6.28, 25.1, 100.5), 1: (0.70, 2.8, 11.2, 44.8)}

VARIANTS = {
    name: f"width {width}, kernels of 3x3, {MILLIONS[3][i]} M parameters; SOC"
    for i, (name, width) in enumerate(WIDTHS.items())
}
VARIANTS |= {
    f"{name},1x1": f"width {width}, kernels of 1x1, {MILLIONS[1][i]} M parameters; SOC"
    for i, (name, width) in enumerate(WIDTHS.items())
}
VARIANTS |= {
    f"xs{kernel},{name}": f"width 16, kernels of {kernel[1:] or '3x3'}, {ACTIVATIONS.get(name, name)}"
    + (f", {name}" if name in ACTIVATIONS else "")
    for kernel in ("", ",1x1")
    for name in (*LAYERS, *ACTIVATIONS)
}


def get_config(variant):
    size, *kind = variant.split(",")
    activation = next((name for name in kind if name in ACTIVATIONS), "maxmin")
    layer = ACTIVATIONS.get(activation) or next((name for name in kind if name in LAYERS), "soc")
    config = default_config("compared", "offset_cross_entropy", "sgd", layer=layer)
    config.model.activation = activation
    rate, decay, epochs = RUNS[ALIKE.get(layer, layer)]
    config.num_epochs = epochs

    config.data.name = "cifar10"
    config.data.validation_fraction = 0.02
    config.data.crop_padding = 4
    config.data.flip = True

    config.model.width = WIDTHS[size]
    config.model.kernel_size = 1 if "1x1" in kind else 3
    config.model.input_mean = (0.4914, 0.4822, 0.4465)

    config.loss.offset = 2 * 2**0.5 * 36 / 255

    config.optimizer.learning_rate = rate
    config.optimizer.weight_decay = decay
    config.optimizer.warmup_epochs = 0.3 * epochs
    config.optimizer.clip_norm = 0.0
    config.checkpoint.every_epochs = 12
    config.certify.radii = (36 / 255, 72 / 255, 108 / 255, 1.0)
    return config.lock()
