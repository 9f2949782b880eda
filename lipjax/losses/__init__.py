"""Training losses: (logits, labels, lipschitz, ...) -> one value per example.

Everywhere lipschitz[i, j] bounds or estimates the Lipschitz constant of logit_i - logit_j in pixel units, labels are
integers in [0, k), epsilon is an l2 radius in pixel units, z_i = y_i - y_t with the label t, and m_i = lipschitz[t, i].
"""

from lipjax.losses.balls import (
    bottom_logit,
    emma,
    gloro,
    logit_annealing,
    margin,
    scaled_offset_cross_entropy,
    shifted_logits,
    trades,
)
from lipjax.losses.logits import (
    boosted_cross_entropy,
    cross_entropy,
    margin_boosting,
    multi_margin,
    offset_cross_entropy,
)
from lipjax.losses.radii import (
    certificate_regularization,
    cll,
    crm,
    crm_max,
    curvature_penalty,
    label_radius,
)
from lipjax.losses.transport import class_counts, hinge, hkr, kantorovich_rubinstein, lse_hkr

__all__ = [
    "boosted_cross_entropy",
    "bottom_logit",
    "certificate_regularization",
    "class_counts",
    "cll",
    "crm",
    "crm_max",
    "cross_entropy",
    "curvature_penalty",
    "emma",
    "gloro",
    "hinge",
    "hkr",
    "kantorovich_rubinstein",
    "label_radius",
    "logit_annealing",
    "lse_hkr",
    "margin",
    "margin_boosting",
    "multi_margin",
    "offset_cross_entropy",
    "scaled_offset_cross_entropy",
    "shifted_logits",
    "trades",
]


def __dir__() -> list[str]:
    return __all__
