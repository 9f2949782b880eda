"""LipConvnet, six layers, on the 1,797 digits inside scikit-learn (8 x 8): a minute or two, nothing to download.

SOC in the frequency domain (arXiv:2108.04062): circular padding and the exact exponential, so that every convolution is
orthogonal in training too. Other layers, activations and heads: --config.model.layer=cayley,
--config.model.activation=householder2, --config.model.head=mlp with --config.loss.name=curvature, and so on.
Run: python train.py --config=configs/digits_lipconvnet.py --workdir=DIR
Measured: accuracy 98.61 %, proved at l2 radius 0.1 97.21 %, 0.25 92.20 %, 0.5 63.23 % (seed 0, commit d621e38, two
cores of an AMD EPYC that did other work besides: 81 s with certification and attack). Others: docs/orthogonal.md.
"""

from lipjax.training.config import default_config


def get_config():
    config = default_config(model="lipconvnet", loss="margin")
    config.batch_size = 128
    config.num_epochs = 40

    config.data.affine = (5.0, 0.05, 0.03)

    config.model.depth = 6
    config.model.num_blocks = 3
    config.model.width = 16
    config.model.head_features = 256
    config.model.padding = "CIRCULAR"
    config.model.train_terms = None  # the exact exponential
    config.model.eval_terms = None
    # A temperature: rows of length 1 on a 1-Lipschitz map give logits too close to each other for the loss.
    config.model.input_std = (0.1,)

    config.loss.epsilon = 0.25
    config.loss.epsilon_end = 1.0
    config.optimizer.learning_rate = 1e-2
    config.checkpoint.every_epochs = 10
    config.certify.radii = (0.1, 0.25, 0.5)
    return config.lock()
