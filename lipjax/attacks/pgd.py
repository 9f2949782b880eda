"""Attacks by gradients: projected gradient ascent and Auto-PGD, and what they ascend."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from lipjax.attacks.input_gradient import of_images
from lipjax.attacks.lipschitz_search import unit
from lipjax.curvature import top_rivals

OBJECTIVES = ("margin", "cross_entropy", "targeted_margin", "dlr", "targeted_dlr")
# What is done towards one rival class after another.
TARGETED = ("targeted_margin", "targeted_dlr")
PIXELS = (0.0, 1.0)
# Auto-PGD: the fraction of steps that must have gained, and the weight of the new step against the last one.
_GAINING, _MOMENTUM = 0.75, 0.75
# Added to the denominators of difference-of-logits ratios.
_NEVER_ZERO = 1e-12

Box = tuple[float, float] | None
Keys = PRNGKeyArray | Key[Array, " b"]


def project_l2(delta: Float[Array, "b ..."], epsilon) -> Float[Array, "b ..."]:
    """Nearest point of the l2 ball of radius epsilon, a number or one per image: (b,)."""
    norm = jnp.sqrt(jnp.sum(delta**2, axis=tuple(range(1, delta.ndim)), keepdims=True))
    epsilon = like(jnp.asarray(epsilon, delta.dtype), delta)
    return delta * jnp.minimum(1.0, epsilon / jnp.maximum(norm, jnp.finfo(delta.dtype).tiny))


def like(values, images):
    """Values of which there is one per image, shaped so that they broadcast over images; a single one stays."""
    return values.reshape(-1, *(1,) * (images.ndim - 1)) if values.ndim else values


def margin_of(logits: Float[Array, "b k"], labels: Int[Array, " b"]) -> Float[Array, " b"]:
    """max_{i != label} logit_i - logit_label: (b,), positive where the class is another."""
    own = labels[:, None] == jnp.arange(logits.shape[1], dtype=labels.dtype)
    return jnp.max(jnp.where(own, -jnp.inf, logits), axis=1) - jnp.sum(jnp.where(own, logits, 0.0), axis=1)


def _own(logits, labels):
    return jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]


def _cross_entropy(logits, labels, _):
    return jax.scipy.special.logsumexp(logits, axis=1) - _own(logits, labels)


def _targeted_margin(logits, labels, targets):
    return _own(logits, targets) - _own(logits, labels)


def dlr(logits: Float[Array, "b k"], labels: Int[Array, " b"]) -> Float[Array, " b"]:
    """Difference-of-logits ratio: max_{i != label} z_i - z_label over z_(1) - z_(3), the largest less the third.

    Neither a factor nor a summand of all logits changes it, so that it has gradients where those of cross-entropy
    vanish. With two classes there is no third logit: the margin itself.
    Source: Croce & Hein 2020, arXiv:2003.01690, eq. 6.
    """
    margin = margin_of(logits, labels)
    if logits.shape[1] < 3:
        return margin
    top = jax.lax.top_k(logits, 3)[0]
    return margin / (top[:, 0] - top[:, 2] + _NEVER_ZERO)


def targeted_dlr(
    logits: Float[Array, "b k"], labels: Int[Array, " b"], targets: Int[Array, " b"]
) -> Float[Array, " b"]:
    """z_target - z_label over z_(1) - (z_(3) + z_(4)) / 2; with three classes over z_(1) - z_(3), with two over 1.

    Source: Croce & Hein 2020, arXiv:2003.01690, eq. 7, which is for four classes or more.
    """
    difference, classes = _targeted_margin(logits, labels, targets), logits.shape[1]
    if classes < 3:
        return difference
    top = jax.lax.top_k(logits, min(classes, 4))[0]
    return difference / (top[:, 0] - jnp.mean(top[:, 2:], axis=1) + _NEVER_ZERO)


# In the order of OBJECTIVES: functions of (logits, labels, targets) -> (b,), which an attack ascends.
_FUNCTIONS = (
    lambda logits, labels, _: margin_of(logits, labels),
    _cross_entropy,
    _targeted_margin,
    lambda logits, labels, _: dlr(logits, labels),
    targeted_dlr,
)


def _objective(name, logits, labels, targets):
    """The objective that an attack ascends: (b,). name: out of OBJECTIVES, or its place there, which may be traced."""
    if isinstance(name, str):
        return _FUNCTIONS[OBJECTIVES.index(name)](logits, labels, targets)
    return jax.lax.switch(name, _FUNCTIONS, logits, labels, targets)


def each(key, function):
    """function(key), or for keys of which there is one per image the results of all: (b, ...)."""
    return jax.vmap(function)(key) if one_per_image(key) else function(key)


def one_per_image(key) -> bool:
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 1


def _random_start(key, images):
    """Directions and lengths of random starts, (b, ...) and (b,)."""
    shape, count = (images.shape[1:], ()) if one_per_image(key) else (images.shape, images.shape[:1])
    noise = each(key, lambda k: jax.random.normal(k, shape, images.dtype))
    return noise, each(key, lambda k: jax.random.uniform(jax.random.fold_in(k, 1), count, images.dtype))


def move_inside(images: Float[Array, "b ..."], epsilon, box: Box) -> Callable:
    """The function of points that takes them to the ball of radius epsilon around the images, and into the box."""

    def inside(points):
        moved = images + project_l2(points - images, epsilon)
        # Clipping to the box moves every pixel towards the original one, so it stays in the ball.
        return moved if box is None else jnp.clip(moved, *box)

    return inside


def _ascend(follow, logits: Callable, images, labels, epsilon, key, objective, num_targets, targets, restarts, box):
    """Runs `follow` from random starts, towards one target after another, and keeps the points of largest margin.

    follow: (gradient, inside, start) -> points and their margins. gradient: x -> (gradient of the objective, (its
    values, margins)). inside: the nearest point of the ball, moved into the box.
    """
    if isinstance(objective, str) and objective not in OBJECTIVES:
        raise ValueError(f"Expected an objective of {OBJECTIVES}, got {objective!r}.")
    if restarts < 1 or num_targets < 1:
        raise ValueError(f"Expected at least one restart and one target, got {restarts} and {num_targets}.")
    epsilon, logits = like(jnp.asarray(epsilon, images.dtype), images), of_images(logits)
    inside = move_inside(images, epsilon, box)

    chosen = labels[:, None] if targets is None else targets[:, None]
    if targets is None and isinstance(objective, str) and objective in TARGETED:
        out = logits(images)
        chosen = top_rivals(out, labels, max(1, min(num_targets, out.shape[1] - 1)))

    def run(i, carry):
        best, best_margin = carry
        target = chosen[:, i % chosen.shape[1]]

        def values(x):
            out = logits(x)
            found = _objective(objective, out, labels, target)
            return jnp.sum(found), (found, margin_of(out, labels))

        noise, shares = _random_start(each(key, lambda k: jax.random.fold_in(k, i)), images)
        start = inside(images + unit(noise) * like(shares, images) * epsilon)
        points, margin = follow(jax.grad(values, has_aux=True), inside, start)
        better = margin > best_margin
        return jnp.where(like(better, images), points, best), jnp.where(better, margin, best_margin)

    nothing = (images, jnp.full(images.shape[0], -jnp.inf, images.dtype))
    return jax.lax.stop_gradient(jax.lax.fori_loop(0, restarts * chosen.shape[1], run, nothing)[0])


def pgd_l2(
    logits: Callable,
    images: Float[Array, "b ..."],
    labels: Int[Array, " b"],
    epsilon,
    key: Keys,
    *,
    num_steps: int,
    relative_step: float = 2.5,
    restarts: int = 1,
    objective: str | Array = "cross_entropy",
    num_targets: int = 9,
    targets: Int[Array, " b"] | None = None,
    box: Box = PIXELS,
) -> Float[Array, "b ..."]:
    """Projected gradient ascent from random starts.

    Args:
      logits: function of images, differentiable.
      images: (b, ...), pixels, inside the box.
      labels: (b,), the classes to move away from.
      epsilon: l2 radius, pixel units: a number, or (b,), one per image.
      key: one for all images, or (b,), one per image, with which a result does not depend on the others in the batch.
      num_steps: of ascent, from each start.
      relative_step: step length times num_steps / epsilon.
      restarts: number of starts.
      objective: "cross_entropy"; "margin", max_{i != label} logit_i - logit_label; "dlr", the margin over a difference
        of logits (`dlr`); "targeted_margin", logit_target - logit_label, and "targeted_dlr" (`targeted_dlr`), for the
        num_targets most likely rivals one after another, each with all steps and restarts, or for one rival that is
        given. Or the place of one of these in OBJECTIVES, an integer, which may be traced: then targets must be given.
      num_targets: of the targeted objectives.
      targets: (b,), the rivals of targeted objectives, or None.
      box: lowest and highest pixel; None: pixels may take any value.
    Returns: images of the same shape within epsilon of the originals, at which the margin was largest; constant under
      differentiation, as adversarial training takes them.
    Raises: ValueError for an unknown objective and for counts below 1.
    Source: Madry et al. 2018, arXiv:1706.06083, with l2 steps.
    Example: logits that are the pixels, and a tie 0.354 away.
      >>> image, label = jnp.array([[0.75, 0.25]]), jnp.array([0])
      >>> found = lipjax.attacks.pgd_l2(lambda x: x, image, label, 0.4, jax.random.key(0), num_steps=10)
      >>> found.argmax(axis=1).tolist()
      [1]
    """
    length = relative_step / max(num_steps, 1) * like(jnp.asarray(epsilon, images.dtype), images)

    def follow(gradient, inside, start):
        def body(_, carry):
            x, best, best_margin = carry
            direction, (_, margin) = gradient(x)
            better = margin > best_margin
            best, best_margin = jnp.where(like(better, x), x, best), jnp.where(better, margin, best_margin)
            return inside(x + length * unit(direction)), best, best_margin

        nothing = jnp.full(images.shape[0], -jnp.inf, images.dtype)
        x, best, best_margin = jax.lax.fori_loop(0, num_steps, body, (start, images, nothing))
        margin = margin_of(logits(x), labels)
        better = margin > best_margin
        return jnp.where(like(better, x), x, best), jnp.where(better, margin, best_margin)

    return _ascend(follow, logits, images, labels, epsilon, key, objective, num_targets, targets, restarts, box)


def checkpoints(num_steps: int) -> list[int]:
    """The steps after which Auto-PGD looks back: ceil(p_j n), p_1 = 0.22, each stretch 0.03 shorter, down to 0.06."""
    fractions = [0.0, 0.22]
    while fractions[-1] < 1:
        fractions.append(fractions[-1] + max(fractions[-1] - fractions[-2] - 0.03, 0.06))
    # Rounded first, so that 0.41 * 100 is 41.
    return sorted({math.ceil(round(p * num_steps, 9)) for p in fractions[1:] if p < 1 and num_steps > 0})


def apgd_l2(
    logits: Callable,
    images: Float[Array, "b ..."],
    labels: Int[Array, " b"],
    epsilon,
    key: Keys,
    *,
    num_steps: int,
    restarts: int = 1,
    objective: str | Array = "cross_entropy",
    num_targets: int = 9,
    targets: Int[Array, " b"] | None = None,
    box: Box = PIXELS,
) -> Float[Array, "b ..."]:
    """Auto-PGD: ascent with momentum whose step, 2 epsilon at first, is halved where it has stopped to gain.

    At each of `checkpoints` an image's step is halved, and its search goes on from the best point so far, if less than
    three quarters of the steps since the last checkpoint raised the objective, or if neither the step length nor the
    best value has changed since then.

    Args:
      logits, images, labels, epsilon, key, num_steps, restarts, objective, num_targets, targets, box: as of `pgd_l2`:
        images (b, ...) in pixels, labels (b,), epsilon an l2 radius in pixel units.
    Returns: as `pgd_l2`: images of the same shape within epsilon of the originals.
    Raises: ValueError as `pgd_l2`.
    Source: Croce & Hein 2020, arXiv:2003.01690, Algorithm 1, with l2 steps along the normalised gradient.
    Example: logits that are the pixels, and a tie 0.354 away.
      >>> image, label = jnp.array([[0.75, 0.25]]), jnp.array([0])
      >>> found = lipjax.attacks.apgd_l2(lambda x: x, image, label, 0.4, jax.random.key(0), num_steps=10)
      >>> found.argmax(axis=1).tolist()
      [1]
    """
    scale = like(jnp.asarray(epsilon, images.dtype), images)
    marks = [0, *checkpoints(num_steps)]
    # At each step the number of steps since the last checkpoint where it ends at one, else 0.
    stretches = np.zeros(max(num_steps, 1), np.int32)
    stretches[np.array(marks[1:], int) - 1] = np.diff(marks)

    def follow(gradient, inside, start):
        def body(step, state):
            x, last, direction, value = state["x"], state["last"], state["direction"], state["value"]
            ahead = inside(x + like(state["length"], x) * scale * unit(direction))
            weight = jnp.where(step == 0, 1.0, _MOMENTUM).astype(x.dtype)
            moved = inside(x + weight * (ahead - x) + (1 - weight) * (x - last))
            new_direction, (new_value, margin) = gradient(moved)
            gains = state["gains"] + (new_value > value).astype(jnp.int32)
            higher = new_value > state["top_value"]
            top = jnp.where(like(higher, x), moved, state["top"])
            top_direction = jnp.where(like(higher, x), new_direction, state["top_direction"])
            top_value = jnp.where(higher, new_value, state["top_value"])
            better = margin > state["best_margin"]

            stretch = jnp.asarray(stretches)[step]
            looks_back = stretch > 0
            stuck = ~state["halved"] & (top_value <= state["mark_value"])
            halve = looks_back & ((gains.astype(x.dtype) < _GAINING * stretch.astype(x.dtype)) | stuck)
            return {
                "x": jnp.where(like(halve, x), top, moved),
                "last": x,
                "direction": jnp.where(like(halve, x), top_direction, new_direction),
                "value": jnp.where(halve, top_value, new_value),
                "length": jnp.where(halve, state["length"] / 2, state["length"]),
                "top": top,
                "top_direction": top_direction,
                "top_value": top_value,
                "best": jnp.where(like(better, x), moved, state["best"]),
                "best_margin": jnp.where(better, margin, state["best_margin"]),
                "gains": jnp.where(looks_back, 0, gains),
                "mark_value": jnp.where(looks_back, top_value, state["mark_value"]),
                "halved": jnp.where(looks_back, halve, state["halved"]),
            }

        direction, (value, margin) = gradient(start)
        state = dict.fromkeys(("x", "last", "top", "best"), start)
        state |= dict.fromkeys(("direction", "top_direction"), direction)
        state |= dict.fromkeys(("value", "top_value", "mark_value"), value) | {"best_margin": margin}
        state |= {"gains": jnp.zeros_like(labels, jnp.int32), "halved": jnp.zeros_like(labels, bool)}
        state = jax.lax.fori_loop(0, num_steps, body, state | {"length": jnp.full_like(value, 2.0)})
        return state["best"], state["best_margin"]

    return _ascend(follow, logits, images, labels, epsilon, key, objective, num_targets, targets, restarts, box)
