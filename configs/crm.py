"""ReLU networks trained by CRM with LipLT (arXiv:2310.00116), on CIFAR-10 and Tiny-ImageNet.

Run: python train.py --config=configs/crm.py:cifar10 --workdir=DIR
     --config=configs/crm.py:help lists the variants.
Measured: never; mnist_4c3f_crm.py was. Published: known to us at second hand only, and not repeated.

All radii, loss.radius among them, are in [0, 1]-pixel units. The released code scales images of CIFAR-10 to [-1, 1] and
certifies at 36/255 there, which is 18/255 of a pixel unit. This error is not repeated: the network sees the same
images, and the factor 2 enters the Lipschitz constants, so that the paper's figures at 36/255 are none to compare with.

Tiny-ImageNet: the shapes of the net are those of the released code, which pads less than the original 8C2F. That code
splits the labelled images itself; here the published validation images are the test set.
"""

from lipjax.training.config import default_config

VARIANTS = {
    "cifar10": "6C2F, 733,866 parameters",
    "tiny_imagenet": "8C2F, 4,342,984 parameters, 64 x 64, 200 classes",
}

# What a data set changes. "cifar10" has the images as the released code, scaled to [-1, 1].
CHANGES = {
    "cifar10": {
        "batch_size": 512,
        "num_epochs": 400,
        "data.affine": (10.0, 0.0, 0.1),
        "model.variant": "6c2f",
        "model.input_std": (0.5,),
        "optimizer.decay_from": 200.0,
    },
    "tiny_imagenet": {
        "num_epochs": 300,
        "data.affine": (20.0, 0.0, 0.2),
        "model.variant": "8c2f",
        "model.input_mean": (0.0,),
        "loss.temperature": 12.0,
        "loss.weight": 150.0,
        "optimizer.learning_rate": 1e-4,
        "optimizer.decay_from": 100.0,
        "certify.attack_images": 1000,
    },
}


def get_config(variant):
    config = default_config(model="convnet", loss="crm", optimizer="adam", schedule="exponential")
    config.lipschitz = "liplt"
    config.power_iterations = 5
    config.data.name = variant
    config.data.validation_fraction = 0.02
    config.data.flip = True

    config.optimizer.eps = 1e-7
    config.optimizer.final_fraction = 1e-3
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.clip_norm = 0.0
    config.checkpoint.every_epochs = 2
    config.update_from_flattened_dict(CHANGES[variant])
    return config.lock()
