"""Optimisers and schedules, from optax."""

import optax

OPTIMIZERS = {
    "adamw": lambda rate, decay: optax.adamw(rate, weight_decay=decay),
    "nadamw": lambda rate, decay: optax.nadamw(rate, weight_decay=decay),
    "sgd": lambda rate, decay: optax.chain(
        optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9, nesterov=True)
    ),
}


def learning_rate_schedule(config, steps_per_epoch: int, num_epochs: int) -> optax.Schedule:
    """Per step: linear warm-up, then a cosine that would reach final_fraction of the peak one step after the last.

    Args: config: the optimizer group: learning_rate, warmup_epochs, final_fraction.
    """
    total = steps_per_epoch * num_epochs
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)
    decay = optax.cosine_decay_schedule(config.learning_rate, max(1, total - warmup), alpha=config.final_fraction)
    if warmup == 0:
        return decay
    # The first step already moves: step i of the warm-up takes (i + 1) / warmup of the peak.
    ramp = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, max(1, warmup - 1))
    return optax.join_schedules([ramp, decay], [warmup])


def make_optimizer(config, steps_per_epoch: int, num_epochs: int) -> optax.GradientTransformation:
    """Global-norm clipping, then the named optimiser with its learning-rate schedule."""
    rate = learning_rate_schedule(config, steps_per_epoch, num_epochs)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), OPTIMIZERS[config.name](rate, config.weight_decay))


def epsilon_at(config, epoch: int, num_epochs: int) -> float:
    """Training radius of an epoch (counted from 0), in pixel units.

    epsilon (start + (end - start) min(epoch / (ramp num_epochs), 1)); config: the loss group.
    Source: Hu et al. 2023, arXiv:2301.12549 (ramp 1/2, start 0.1, end up to 3).
    """
    ramp = config.epsilon_ramp * num_epochs
    reached = 1.0 if ramp == 0 else min(epoch / ramp, 1.0)
    return config.epsilon * (config.epsilon_start + (config.epsilon_end - config.epsilon_start) * reached)
