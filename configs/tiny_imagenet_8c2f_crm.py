"""8C2F (4,342,984 parameters, ReLU) trained by CRM with LipLT, Tiny-ImageNet (64 x 64, 200 classes; arXiv:2310.00116).

Run: python train.py --config=configs/tiny_imagenet_8c2f_crm.py --workdir=DIR
The paper's figures for this net are not known to us. Its shapes are those of the released code, which pads less than
the original 8C2F. That code splits the labelled images itself; here the published validation images are the test set.
Measured: never (300 epochs need an accelerator).
"""

import ml_collections

from lipjax.training.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 256
    config.num_epochs = 300
    config.lipschitz = "liplt"
    config.power_iterations = 5

    config.data.name = "tiny_imagenet"
    config.data.validation_fraction = 0.02
    config.data.flip = True
    config.data.affine = (20.0, 0.0, 0.2)

    config.model = ml_collections.ConfigDict({"name": "convnet", "variant": "8c2f", "activation": "relu"})

    config.loss.name = "crm"
    config.loss.epsilon = 36 / 255
    config.loss.temperature = 12.0
    config.loss.radius = 0.2
    config.loss.weight = 150.0
    config.loss.weight_start_epoch = 10

    config.optimizer.name = "adam"
    config.optimizer.eps = 1e-7
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "exponential"
    config.optimizer.decay_from = 100.0
    config.optimizer.final_fraction = 1e-3
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.clip_norm = 0.0
    config.checkpoint.every_epochs = 2
    config.certify.radii = (36 / 255, 72 / 255, 108 / 255)
    config.certify.attack_images = 1000
    return config.lock()
