"""Optimisers from optax by name, and schedules of the learning rate by name."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lipjax import manifold
from lipjax.errors import UserError
from lipjax.training.setting import Setting, at_least_0, positive


class NadamState(NamedTuple):
    """count: updates made. product: of the momenta mu_1 ... mu_count. mu, nu: means of gradients and their squares."""

    count: Any
    product: Any
    mu: Any
    nu: Any


_B1, _B2, _MOMENTUM_DECAY = 0.9, 0.999, 0.004  # torch's defaults


def scale_by_torch_nadam(eps: float) -> optax.GradientTransformation:
    """NAdam with the momentum schedule of its paper and of torch, which `optax.nadam` leaves out.

    mu_t = b1 (1 - 0.96^(0.004 t) / 2), which rises from b1 / 2 to b1. With m and v Adam's means of gradients g and of
    their squares, and P_t = mu_1 ... mu_t, the update is
      ((1 - mu_t) / (1 - P_t) g + mu_(t+1) / (1 - P_(t+1)) m) / (sqrt(v / (1 - b2^t)) + eps).

    Args: eps: in the denominator, beside the root.
    Source: Dozat 2016, Incorporating Nesterov momentum into Adam; torch.optim.NAdam.
    """

    def momentum(count):
        return _B1 * (1 - 0.5 * 0.96 ** (_MOMENTUM_DECAY * count))

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return NadamState(jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(updates, state, params=None):
        del params
        count = state.count + 1
        now, following = (momentum(jnp.asarray(t, jnp.float32)) for t in (count, count + 1))
        product = state.product * now
        mu = jax.tree.map(lambda m, g: _B1 * m + (1 - _B1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: _B2 * v + (1 - _B2) * g**2, state.nu, updates)
        of_gradient, of_mean = (1 - now) / (1 - product), following / (1 - product * following)
        correction = -jnp.expm1(jnp.asarray(count, jnp.float32) * math.log(_B2))  # 1 - b2^t, without cancellation
        moved = jax.tree.map(
            lambda g, m, v: ((of_gradient * g + of_mean * m) / (jnp.sqrt(v / correction) + eps)).astype(g.dtype),
            *(updates, mu, nu),
        )
        return moved, NadamState(count, product.astype(jnp.float32), mu, nu)

    return optax.GradientTransformation(init, update)


class LookaheadState(NamedTuple):
    """count: updates made. slow: the slow parameters, from the first synchronisation on. fast: of the optimiser."""

    count: Any
    slow: Any
    fast: Any


def lookahead(
    fast: optax.GradientTransformation, period: int, rate: float, steps_per_epoch: int, itself: Callable | None = None
) -> optax.GradientTransformation:
    """Every `period` steps and at the end of every epoch: slow <- slow + rate (params - slow), params <- slow.

    The parameters that are trained are the fast ones. Since every epoch ends with a synchronisation, those that are
    validated and kept as the best are the slow ones; of a checkpoint between epochs `loop.load_best` takes these.
    The first synchronisation sets slow to the parameters. In `optax.lookahead` parameters are pairs, and it does not
    synchronise at the end of an epoch.

    Args: itself: parameters -> for each whether `fast` does this for it at the same steps, in its own way; slow then is
      what that leaves. None: for none.
    Source: Zhang et al. 2019, arXiv:1907.08610; start and end of the epoch as in the recipe's code (timm's Lookahead).
    """

    def init(params):
        return LookaheadState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), fast.init(params))

    def update(updates, state, params: Any = None):
        updates, inner = fast.update(updates, state.fast, params)
        count = state.count + 1
        synchronise = (count % period == 0) | (count % steps_per_epoch == 0)
        first = count == min(period, steps_per_epoch)
        moved = optax.apply_updates(params, updates)
        done = jax.tree.map(lambda p: False, params) if itself is None else itself(params)
        target = jax.tree.map(
            lambda s, p, own: p if own else jnp.where(first, p, s + rate * (p - s)), state.slow, moved, done
        )
        slow = jax.tree.map(lambda s, t: jnp.where(synchronise, t, s), state.slow, target)
        updates = jax.tree.map(lambda u, t, p: jnp.where(synchronise, t - p, u), updates, target, params)
        return updates, LookaheadState(count, slow, inner)

    return optax.GradientTransformation(init, update)


def slow_parameters(params: Any, opt_state: Any) -> Any:
    """Parameters for Lookahead to evaluate: its slow parameters, once it has synchronised; else the parameters."""
    if not isinstance(opt_state, LookaheadState):
        return params
    synchronised = any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(opt_state.slow))  # they start at zero
    return opt_state.slow if synchronised else params


def _decay_in_gradient(update: optax.GradientTransformation, config, mask) -> optax.GradientTransformation:
    """As torch's optimisers have it: the decay is part of the gradient."""
    return optax.chain(optax.add_decayed_weights(config.weight_decay, mask), update)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An entry of OPTIMIZERS.

    Attributes: make: (learning-rate schedule, optimizer group of the config, mask of what decays, steps of an epoch) ->
      optax's. fields: that config.optimizer has for it alone. itself: of parameters that it makes Lookahead for, in its
      own way: see `lookahead`.
    """

    make: Callable[[optax.Schedule, Any, Any, int], optax.GradientTransformation]
    fields: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    itself: Callable | None = None


def _adam(rate, config, mask, per_epoch):
    del per_epoch
    return _decay_in_gradient(optax.adam(rate, eps=config.eps), config, mask)


def _adamw(rate, config, mask, per_epoch):
    del per_epoch
    return optax.adamw(rate, eps=config.eps, weight_decay=config.weight_decay, mask=mask)


def _nadam(rate, config, mask, per_epoch):
    del per_epoch
    update = optax.chain(scale_by_torch_nadam(config.eps), optax.scale_by_learning_rate(rate))
    return _decay_in_gradient(update, config, mask)


def _nadamw(rate, config, mask, per_epoch):
    del per_epoch
    return optax.nadamw(rate, eps=config.eps, weight_decay=config.weight_decay, mask=mask)


def _sgd(rate, config, mask, per_epoch):
    del per_epoch
    return _decay_in_gradient(optax.sgd(rate, momentum=0.9), config, mask)  # not Nesterov's momentum


def _manifold_adam(rate, config, mask, per_epoch):
    """Orthonormal again at the end of every epoch, where Lookahead synchronises, too."""
    part = config.orthogonal_rate
    orthogonal = manifold.skew_adam(
        lambda count: part * rate(count),
        eps=config.eps,
        moments=config.moments,
        exponential=config.exponential,
        retract_every=per_epoch,
        lookahead_period=config.lookahead_period,
        lookahead_rate=config.lookahead_rate,
    )
    both = manifold.partition(orthogonal, OPTIMIZERS[config.others].make(rate, config, mask, per_epoch))

    def init(params):
        if not jax.tree.leaves(manifold.orthogonal_parameters(params)):
            raise UserError(
                'config.optimizer.name = "manifold_adam" keeps parameters orthogonal whose names begin with '
                f'"{manifold.PREFIX}", and this model has none: take "{config.others}".'
            )
        return both.init(params)

    return optax.GradientTransformation(init, both.update)


def _on_manifold(params):
    return jax.tree.map(lambda label: label == "orthogonal", manifold.labels(params))


def _one_of(names: tuple[str, ...], default: str, comment: str) -> Setting:
    listed = ", ".join(f'"{name}"' for name in names)
    return Setting(default, f"{comment}: {listed}", lambda value, config: value in names, f"one of {names}")


_EPS = {"eps": positive(1e-8, "in the denominator")}

OPTIMIZERS = {
    "adam": Optimizer(_adam, _EPS),
    "adamw": Optimizer(_adamw, _EPS),
    "nadam": Optimizer(_nadam, _EPS),
    "nadamw": Optimizer(_nadamw, _EPS),
    "sgd": Optimizer(_sgd),
}
_OTHERS = tuple(OPTIMIZERS)
OPTIMIZERS["manifold_adam"] = Optimizer(
    _manifold_adam,
    {
        **_EPS,
        "others": _one_of(_OTHERS, "adamw", "the optimizer of parameters that are not orthogonal"),
        "orthogonal_rate": positive(0.5, "learning rate of orthogonal parameters, as a multiple of learning_rate"),
        "moments": _one_of(tuple(manifold.MOMENTS), "skew", "what Adam's moments are of"),
        "exponential": _one_of(
            ("taylor", "exact"), "taylor", "of a step, by a series as short as norms allow or exact"
        ),
    },
    _on_manifold,
)


def check_start(config, params: Any) -> None:
    """Raises: UserError if the optimizer keeps parameters orthogonal, and one is not so at the start.

    Args: config: the optimizer group. params: known numbers.
    """
    if config.name == "manifold_adam":
        manifold.check_orthonormal(manifold.orthogonal_parameters(params))


DECAYED = ("all", "weights")


def decay_mask(which: str):
    """Says which parameters the weight decay shrinks: a function of the parameters, for optax.

    Args: which: "all" (but the angles of activations, the scale of a Cayley transform and that of logits), or "weights"
      (of those the kernels and matrices, without the MLP head's).
    """

    def decays(path, leaf) -> bool:
        name = path[-1].key
        if name.startswith("theta") or name in ("alpha", "log_scale"):
            return False
        # The bias and gamma of a stack are (layers, width).
        return which == "all" or (leaf.ndim > 1 and name not in ("w1", "w2", "bias", "gamma"))

    return lambda params: jax.tree_util.tree_map_with_path(decays, params)


@dataclasses.dataclass(frozen=True)
class Decay:
    """An entry of SCHEDULES: what the learning rate does from the warm-up on.

    Attributes: make: (optimizer group of the config, warm-up steps, all steps, steps of an epoch) -> a schedule that
      counts from the end of the warm-up. fields: that config.optimizer has for it alone.
    """

    make: Callable[[Any, int, int, int], optax.Schedule]
    fields: Mapping[str, Setting] = dataclasses.field(default_factory=dict)


def _cosine(config, warmup: int, total: int, per_epoch: int) -> optax.Schedule:
    del per_epoch
    return optax.cosine_decay_schedule(config.learning_rate, max(1, total - warmup), alpha=config.final_fraction)


def _exponential(config, warmup: int, total: int, per_epoch: int) -> optax.Schedule:
    begin = max(0, round(config.decay_from * per_epoch) - warmup)
    transition = max(1, total - 1 - warmup - begin)
    return optax.exponential_decay(config.learning_rate, transition, config.final_fraction, transition_begin=begin)


def _step(config, warmup: int, total: int, per_epoch: int) -> optax.Schedule:
    del per_epoch
    # Counted from the end of the warm-up, because joined schedules count from their own start.
    drops = {max(1, round(fraction * total) - warmup): 0.1 for fraction in (0.5, 0.75)}
    return optax.piecewise_constant_schedule(config.learning_rate, drops)


def _triangular(config, warmup: int, total: int, per_epoch: int) -> optax.Schedule:
    del per_epoch
    peak, knee = config.learning_rate, max(1, round(0.8 * total) - warmup)
    sides = (
        optax.linear_schedule(peak, peak / 20, knee),
        optax.linear_schedule(peak / 20, 0.0, max(1, total - warmup - knee)),
    )
    return optax.join_schedules(sides, [knee])


_FINAL = {
    "final_fraction": Setting(
        1e-5,
        "of the learning rate, at the end of the schedule",
        lambda value, config: value > 0 or value == 0 and config.optimizer.schedule != "exponential",
        'at least 0, and above 0 for the schedule "exponential"',
    )
}

SCHEDULES = {
    "cosine": Decay(_cosine, _FINAL),
    "exponential": Decay(
        _exponential, {"decay_from": at_least_0(0.0, "epochs, until which the rate is constant")} | _FINAL
    ),
    "step": Decay(_step),
    "triangular": Decay(_triangular),
}


def learning_rate_schedule(config, steps_per_epoch: int, num_epochs: int) -> optax.Schedule:
    """Per step: linear warm-up, then what `schedule` names, down to final_fraction of the peak one step after the last.

    "cosine"; "exponential": the peak for decay_from epochs, then final_fraction^t, t from 0 to 1 at the last step
    (without decay if decay_from is not below num_epochs); "step": a tenth of the rate from 1/2 of the epochs on and a
    hundredth from 3/4, without final_fraction; "triangular": linearly to a twentieth at 4/5 of the epochs, and to 0 at
    the end (of the codes for CPL, SLL and sandwich layers, which warm up for 2/5 of the epochs).

    Args: config: the optimizer group: schedule and the fields that it brings, learning_rate, warmup_epochs.
    """
    total = steps_per_epoch * num_epochs
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)
    decay = SCHEDULES[config.schedule].make(config, warmup, total, steps_per_epoch)
    if warmup == 0:
        return decay
    # The first step already moves: step i of the warm-up takes (i + 1) / warmup of the peak.
    ramp = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, max(1, warmup - 1))
    return optax.join_schedules([ramp, decay], [warmup])


def make_optimizer(
    config, steps_per_epoch: int, num_epochs: int, head_only: bool = False
) -> optax.GradientTransformation:
    """Global-norm clipping (none for clip_norm 0), then the named optimiser with its learning-rate schedule.

    Around both Lookahead, unless lookahead_period is 0.

    Args: config: the optimizer group. head_only: leaves all parameters but those of "head" as they are.
    """
    rate = learning_rate_schedule(config, steps_per_epoch, num_epochs)
    chosen = OPTIMIZERS[config.name]
    update = chosen.make(rate, config, decay_mask(config.decay), steps_per_epoch)
    if config.clip_norm:
        update = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    if head_only:
        still = optax.masked(optax.set_to_zero(), _not_the_head)
        update = optax.chain(still, update, still)  # before, for the norm that is clipped; after, for the decay
    if config.lookahead_period:
        update = lookahead(update, config.lookahead_period, config.lookahead_rate, steps_per_epoch, chosen.itself)
    return update


def _not_the_head(params):
    return {name: jax.tree.map(lambda _, name=name: name != "head", tree) for name, tree in params.items()}
