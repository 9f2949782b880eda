"""A LipNeXt-style network on CIFAR-10 for two CPU cores: 8 x 8 tokens, 128 channels, eight blocks (790,795 parameters).

Of LipNeXt (arXiv:2601.18513) no code is public: docs/lipnext.md says what is known. Grid, neck, loss and scale of the
logits are our choice: l2 pooling of 4 x 4 regions before a dense layer, logit annealing (arXiv:2505.15174), a learned
scale that starts low. Batch, learning rate and warm-up are not tuned.

Run: python train.py --config=configs/cifar10_lipnext_small.py --workdir=DIR
Measured on all 10,000 test images: accuracy 61.71 %, proved at l2 radius 36/255 53.06 %, 72/255 44.32 %, 108/255
36.56 %, 1 10.93 %; for the float32 program, too, 52.16, 43.40, 35.57 and 10.22 %; under attack, on 500 of them, 52.8,
45.4, 39.0 and 19.4 %. Seed 0, the code of commit b65d1d3, --config.certify.dtype=float32, 26 minutes of one core of an
AMD EPYC, and 6 of the clock for certification and attack. The network is in the zoo as cifar10_lipnext. Longer runs and
other settings have not been tried.
"""

from lipjax.training.config import default_config


def get_config():
    config = default_config(model="lipnext", loss="logit_annealing", optimizer="nadam")
    config.batch_size = 128
    config.num_epochs = 15
    config.power_iterations = 3

    config.data.name = "cifar10"
    config.data.validation_fraction = 0.02
    config.data.crop_padding = 4
    config.data.flip = True

    config.model.tokens = 8
    config.model.width = 128
    config.model.depth = 8
    config.model.regions = 4
    config.model.neck_features = 256
    config.model.logit_scale = 2.0

    config.optimizer.learning_rate = 2e-3
    config.checkpoint.every_steps = 100
    config.certify.radii = (36 / 255, 72 / 255, 108 / 255, 1.0)
    config.certify.attack_images = 500
    return config.lock()
