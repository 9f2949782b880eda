"""A LipNeXt-style network, four blocks, on the 1,797 digits inside scikit-learn (8 x 8): about a minute, no download.

Patches of 2 x 2 pixels are tokens, on a grid of 4 x 4. Of LipNeXt (arXiv:2601.18513) no code is public: docs/lipnext.md
says what is known. Other forms: --config.model.orthogonal=exponential, --config.model.neck=l2, and so on.
Run: python train.py --config=configs/digits_lipnext.py --workdir=DIR
Measured: accuracy 97.21 %, proved at l2 radius 0.1 95.26 %, 0.25 88.30 %, 0.5 60.45 % (seed 0, commit c9fec03, two
cores of an AMD EPYC that did other work besides: 36 s of processor time with compilation, certification and attack).
"""

from lipjax.training.config import default_config


def get_config():
    config = default_config(model="lipnext", loss="margin", optimizer="adam")
    config.batch_size = 128
    config.num_epochs = 100

    config.data.affine = (5.0, 0.05, 0.03)

    config.model.tokens = 4
    config.model.width = 64
    config.model.depth = 4
    config.model.regions = 2
    config.model.neck_features = 64
    config.model.logit_scale = 10.0

    config.loss.epsilon = 0.25
    config.loss.epsilon_end = 1.5
    config.optimizer.learning_rate = 5e-3
    config.checkpoint.every_epochs = 10
    config.certify.radii = (0.1, 0.25, 0.5)
    return config.lock()
