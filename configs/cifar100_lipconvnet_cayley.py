"""LipConvnet-10 with Cayley convolutions, LLN and MaxMin, CIFAR-100 (arXiv:2104.07167 in the nets of arXiv:2108.04062).

Run: python train.py --config=configs/cifar100_lipconvnet_cayley.py --workdir=DIR
Published: no figures known for this net.
Measured: never (200 epochs need an accelerator).
"""

import ml_collections

from lipjax.training.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 128
    config.num_epochs = 200

    config.data.name = "cifar100"
    config.data.validation_fraction = 0.02
    config.data.crop_padding = 4
    config.data.flip = True

    config.model = ml_collections.ConfigDict(
        {
            "name": "lipconvnet",
            "depth": 10,
            "layer": "cayley",
            "activation": "maxmin",
            "head": "lln",
            "input_mean": (0.4914, 0.4822, 0.4465),
            "input_std": (0.2507,),
        }
    )

    config.loss.name = "cross_entropy"
    config.loss.epsilon = 36 / 255

    # As the paper's code: the rate falls tenfold at 1/2 and 3/4 of the epochs, no warm-up, no clipping.
    config.optimizer.name = "sgd"
    config.optimizer.schedule = "step"
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.clip_norm = 0.0
    config.checkpoint.every_epochs = 2
    config.certify.radii = (36 / 255, 72 / 255, 108 / 255)
    return config.lock()
