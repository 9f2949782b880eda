"""Losses by name: the fields that config.loss has for each, the numbers that follow the epoch, and the loss itself."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lipjax import losses
from lipjax.training.setting import Setting, at_least_0, growth, positive

Schedule = dict[str, Any]
"""Numbers of an epoch by name, as they are logged: traced, so that nothing is compiled again when they change."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """The numbers of a batch that a loss may use.

    Attributes: logits: (b, k). labels: (b,). lipschitz: (k, k), estimates for the logit differences.
      curvatures: () -> (b, r), of each label's difference to its largest rivals, for an MLP head alone.
      class_counts: (k,), images of each class in the whole batch, of which these may be a part; None: these are all.
    """

    logits: jax.Array
    labels: jax.Array
    lipschitz: Any
    curvatures: Callable[[], jax.Array] | None = None
    class_counts: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Loss:
    """An entry of LOSSES. config stands for the group config.loss.

    Attributes:
      apply: (config, Seen, Schedule) -> (b,), the losses of the images.
      fields: that config.loss has beside `name`, `class_weights` and `epsilon`, which every loss has.
      schedule: (config, epoch, num_epochs) -> the numbers of that epoch, counted from 0.
      needs_mlp: whether it is for models with config.model.head = "mlp" alone.
    """

    apply: Callable[[Any, Seen, Schedule], jax.Array]
    fields: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    schedule: Callable[[Any, int, int], Schedule] = lambda config, epoch, num_epochs: {}
    needs_mlp: bool = False


def epsilon_at(config, epoch: int, num_epochs: int) -> float:
    """Training radius of an epoch (counted from 0), in pixel units.

    epsilon (start + (end - start) min(epoch / (ramp num_epochs), 1)); config: the loss group.
    Source: Hu et al. 2023, arXiv:2301.12549 (ramp 1/2, start 0.1, end up to 3).
    """
    ramp = config.epsilon_ramp * num_epochs
    reached = 1.0 if ramp == 0 else min(epoch / ramp, 1.0)
    return config.epsilon * (config.epsilon_start + (config.epsilon_end - config.epsilon_start) * reached)


def crm_schedule(config, epoch: int, num_epochs: int) -> Schedule:
    """Weight (nats per pixel unit) and radius (pixel units) of the CRM losses in an epoch, counted from 0.

    From weight_start_epoch on, epoch s, they grow by their factors: weight weight_growth^(epoch - s), 0 before; radius
    radius_growth^(epoch - s), radius before.

    Source: the code of Fazlyab et al. 2023, arXiv:2310.00116 (10 epochs without weight).
    """
    del num_epochs
    grown = max(epoch - config.weight_start_epoch, 0)
    weight = config.weight * config.weight_growth**grown if epoch >= config.weight_start_epoch else 0.0
    return {"crm_weight": float(weight), "crm_radius": float(config.radius * config.radius_growth**grown)}


_RISING_EPSILON = {
    "epsilon_start": at_least_0(0.1, "training radius as a multiple of epsilon, in the first epoch"),
    "epsilon_end": positive(3.0, "and from epsilon_ramp on"),
    "epsilon_ramp": Setting(
        0.5,
        "fraction of the epochs over which it rises linearly",
        lambda value, config: 0 <= value <= 1,
        "a fraction in [0, 1]",
    ),
}

_CRM = {
    "temperature": positive(5.0, "t of the soft minimum of the radii, in 1 / pixel unit"),
    "radius": positive(0.2, "r_0: only images certified below this radius are penalised"),
    "weight": at_least_0(15.0, "lambda of the penalty"),
    "weight_start_epoch": at_least_0(10, "lambda is 0 in that many epochs"),
    "weight_growth": growth(1.0, "factor of lambda per epoch, from then on"),
    "radius_growth": growth(1.0, "likewise of r_0"),
    "include_misclassified": Setting(False, "penalise wrongly classified images too, which makes them robustly wrong"),
    "boosted": Setting(False, "cross-entropy that also pushes down the largest wrong probability"),
}


_TEMPERATURE = positive(0.25, "t of t CE(logits / t), in units of logits")

_CLL = {
    "slack": Setting(
        0.05,
        "p: at distance epsilon from a boundary the probability is 1 - p / 2",
        lambda value, config: 0 < value < 1,
        "between 0 and 1",
    ),
    "shift": at_least_0(36 / 255, "radius that rivals are raised by, in pixel units"),
    "two_sided": Setting(True, "lower the label by it, too"),
    "weight": at_least_0(0.0, "lambda of the squared largest Lipschitz constant"),
}

_HKR = {
    "margin": positive(1.0, "of the hinges, in units of logits"),
    "alpha": Setting(0.9, "weight of the hinges", lambda value, config: 0 <= value <= 1, "a fraction in [0, 1]"),
}


def _at_epsilon(loss, **fields: Setting) -> Loss:
    """A loss at the training radius. fields: those of its own, which it takes as well."""

    def apply(config, seen, schedule):
        own = {field: config[field] for field in fields}
        return loss(seen.logits, seen.labels, seen.lipschitz, schedule["epsilon"], **own)

    return Loss(apply, _RISING_EPSILON | fields, lambda *at: {"epsilon": epsilon_at(*at)})


def _logits_alone(loss, **fields: Setting) -> Loss:
    """A loss of logits and labels. fields: those of its own, which it takes as well."""

    def apply(config, seen, schedule):
        del schedule
        return loss(seen.logits, seen.labels, **{field: config[field] for field in fields})

    return Loss(apply, fields)


def _crm(loss) -> Loss:
    def apply(config, seen, schedule):
        fixed = {name: config[name] for name in ("temperature", "include_misclassified", "boosted")}
        scheduled = {"weight": schedule["crm_weight"], "radius": schedule["crm_radius"]}
        return loss(seen.logits, seen.labels, seen.lipschitz, **scheduled, **fixed)

    return Loss(apply, _CRM, crm_schedule)


def _trades(logits, labels, lipschitz, epsilon, trades_weight):
    return losses.trades(logits, labels, lipschitz, epsilon, weight=trades_weight)


def _certificate_regularization(config, seen, schedule):
    del schedule
    return losses.certificate_regularization(seen.logits, seen.labels, seen.lipschitz, config.gamma)


def _curvature(config, seen, schedule):
    del schedule
    return losses.curvature_penalty(seen.logits, seen.labels, seen.curvatures(), config.curvature_weight)


def _scaled_offset_cross_entropy(config, seen, schedule):
    del schedule
    own = {"offset": config.epsilon, "temperature": config.temperature}
    return losses.scaled_offset_cross_entropy(seen.logits, seen.labels, seen.lipschitz, **own)


def _cll(config, seen, schedule):
    del schedule
    own = {field: config[field] for field in ("epsilon", *_CLL)}
    return losses.cll(seen.logits, seen.labels, seen.lipschitz, **own)


def _hkr(config, seen, schedule):
    del schedule
    own = {field: config[field] for field in _HKR}
    return losses.hkr(seen.logits, seen.labels, **own, class_counts=seen.class_counts)


LOSSES: dict[str, Loss] = {
    "emma": _at_epsilon(losses.emma),
    "margin": _at_epsilon(losses.margin),
    "gloro": _at_epsilon(losses.gloro),
    "trades": _at_epsilon(_trades, trades_weight=at_least_0(1.0, "lambda of the second term")),
    "certificate_regularization": Loss(
        _certificate_regularization, {"gamma": at_least_0(0.0, "weight of the certified radius")}
    ),
    "curvature": Loss(
        _curvature,
        {"curvature_weight": at_least_0(0.01, "beta, the weight of the mean curvature")},
        needs_mlp=True,
    ),
    "crm": _crm(losses.crm),
    "crm_max": _crm(losses.crm_max),
    "cross_entropy": _logits_alone(losses.cross_entropy),
    "offset_cross_entropy": _logits_alone(
        losses.offset_cross_entropy,
        offset=at_least_0(2**0.5, "taken from the label's logit, in units of logits"),
        temperature=_TEMPERATURE,
    ),
    "scaled_offset_cross_entropy": Loss(_scaled_offset_cross_entropy, {"temperature": _TEMPERATURE}),
    "logit_annealing": _at_epsilon(
        losses.logit_annealing,
        offset=at_least_0(2.0, "xi, taken from the label's logit, in units of logits"),
        temperature=positive(0.75, "t, in units of logits"),
        power=Setting(
            5.0,
            "of 1 - p, p the label's probability: images with large p count little",
            lambda value, config: value == 0 or value >= 1,
            "0 or at least 1",
        ),
    ),
    "cll": Loss(_cll, _CLL),
    "hkr": Loss(_hkr, _HKR),
    "lse_hkr": _logits_alone(
        losses.lse_hkr,
        **_HKR,
        temperature=positive(1.0, "factor of the logits"),
        penalty=positive(1.0, "how far the soft maximum may exceed the maximum, as a multiple of margin / 2"),
    ),
    "multi_margin": _logits_alone(
        losses.multi_margin,
        margin=positive(0.7, "by which the label's logit is to exceed all others"),
        power=Setting(1.0, "of the hinges", lambda value, config: value >= 1, "at least 1"),
    ),
    "margin_boosting": _logits_alone(losses.margin_boosting),
}


def loss_schedule(config, epoch: int, num_epochs: int) -> Schedule:
    """The numbers of an epoch (counted from 0) that the loss of the group config.loss takes, as Python floats."""
    return LOSSES[config.name].schedule(config, epoch, num_epochs)
