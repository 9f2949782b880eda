"""LipConvnet-5 of a quarter of the published width, CIFAR-10, for two CPU cores: SOC in the frequency domain.

Run: python train.py --config=configs/cifar10_lipconvnet_small.py --workdir=DIR
     --config.model.padding=ZERO --config.model.train_terms=5 --config.model.eval_terms=12  SOC in the spatial domain
     --config.model.layer=cayley                                                            Cayley
Measured, after 4 of 6 epochs (--config.num_epochs=6): accuracy 52.66 %, proved at l2 radius 36/255 33.52 %, 72/255
17.78 %, 108/255 8.20 % on all 10,000 test images, with --config.model.train_terms=5 --config.model.eval_terms=12. Seed
0, commit 9464864, two cores of an AMD EPYC that did other work besides. SOC in both domains, and Cayley:
docs/orthogonal.md.
"""

from lipjax.training.config import default_config


def get_config():
    config = default_config(model="lipconvnet", loss="cross_entropy", optimizer="sgd", schedule="step")
    config.batch_size = 128
    config.num_epochs = 8

    config.data.name = "cifar10"
    config.data.validation_fraction = 0.02
    config.data.crop_padding = 4
    config.data.flip = True

    config.model.width = 8
    config.model.padding = "CIRCULAR"
    config.model.train_terms = None  # the exact exponential
    config.model.eval_terms = None
    config.model.input_mean = (0.4914, 0.4822, 0.4465)
    config.model.input_std = (0.2507,)

    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 5e-4
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.clip_norm = 0.0
    config.checkpoint.every_steps = 100
    config.certify.attack_images = 1000
    return config.lock()
