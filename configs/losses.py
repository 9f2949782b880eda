"""One network, many losses, CIFAR-10, for docs/losses.md: the network of configs/cifar10_lipnext_small.py.

Run: python train.py --config=configs/losses.py:emma --workdir=DIR
     --config=configs/losses.py:help lists the variants.
Measured: see docs/losses.md.

Ten epochs; data, batch, optimizer and schedule are those of the network's own config, whatever the loss. It is
1-Lipschitz by construction, which HKR needs. All losses but HKR see its logits times a learned factor. Settings of the
losses are those of the papers where they have some for CIFAR-10, in pixel units; those of HKR are ours. Nothing is
tuned.
"""

from lipjax.training.choices import update
from lipjax.training.config_file import read_config

# Loss and its fields.
LOSSES = {
    "emma": ("emma", {}),
    "emma_small": ("emma", {"loss.epsilon_end": 1.0}),
    "margin": ("margin", {}),
    "logit_annealing": ("logit_annealing", {}),
    "offset_36": ("scaled_offset_cross_entropy", {"loss.epsilon": 36 / 255}),
    "offset_108": ("scaled_offset_cross_entropy", {"loss.epsilon": 108 / 255}),
    "offset_255": ("scaled_offset_cross_entropy", {"loss.epsilon": 1.0}),
    "cll_low": ("cll", {"loss.epsilon": 0.15, "loss.slack": 0.3, "loss.shift": 0.15}),
    "cll_high": ("cll", {"loss.epsilon": 0.5, "loss.slack": 0.01, "loss.shift": 0.5}),
    "crm": ("crm", {"loss.weight_start_epoch": 3}),
    "hkr": ("hkr", {"loss.margin": 1.0, "loss.alpha": 0.95, "model.logit_scale": 0.0}),
}
VARIANTS = {
    "emma": "EMMA, radius from 0.1 to 3 times 36/255",
    "emma_small": "likewise from 0.1 to 1 times 36/255: for comparing at 36/255 alone",
    "margin": "margins added to all rivals' logits, radius as of emma",
    "logit_annealing": "annealed logits on EMMA's shifts (arXiv:2505.15174)",
    "offset_36": "offset cross-entropy, the offset a radius of 36/255",
    "offset_108": "likewise of 108/255",
    "offset_255": "likewise of 1",
    "cll_low": "calibrated Lipschitz-margin loss, epsilon 0.15, p 0.3",
    "cll_high": "likewise, epsilon 0.5, p 0.01",
    "crm": "certified radius maximisation, its weight 0 in the first three epochs",
    "hkr": "hinge and Kantorovich-Rubinstein, alpha 0.95, margin 1",
}


def get_config(variant):
    config, _ = read_config("cifar10_lipnext_small", [])
    name, fields = LOSSES[variant]
    with config.unlocked():
        update(config, {"loss.name": name, **fields})
        config.num_epochs = 10
        config.optimizer.warmup_epochs = 1.0
        config.certify.radii = (36 / 255, 72 / 255, 108 / 255, 1.0)
    return config.lock()
