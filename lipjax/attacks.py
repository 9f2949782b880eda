"""Attacks: upper bounds of the robust accuracy, and attempts to break certificates and Lipschitz bounds."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lipjax._input_gradient import of_images
from lipjax._lipschitz_search import LipschitzSearch, lipschitz_lower_bound, unit
from lipjax.curvature import top_rivals

METHODS = ("pgd", "apgd")
OBJECTIVES = ("margin", "cross_entropy", "targeted_margin")
PIXELS = (0.0, 1.0)
# Auto-PGD: the fraction of steps that must have gained, and the weight of the new step against the last one.
_GAINING, _MOMENTUM = 0.75, 0.75
_HALVINGS = 8  # a point that was found is moved towards the image until the way is known to one part in 2^this

Box = tuple[float, float] | None


def project_l2(delta: Float[Array, "b ..."], epsilon) -> Float[Array, "b ..."]:
    """Nearest point of the l2 ball of radius epsilon, a number or one per image: (b,)."""
    norm = jnp.sqrt(jnp.sum(delta**2, axis=tuple(range(1, delta.ndim)), keepdims=True))
    epsilon = _like(jnp.asarray(epsilon, delta.dtype), delta)
    return delta * jnp.minimum(1.0, epsilon / jnp.maximum(norm, jnp.finfo(delta.dtype).tiny))


def _like(values, images):
    """Values of which there is one per image, shaped so that they broadcast over images; a single one stays."""
    return values.reshape(-1, *(1,) * (images.ndim - 1)) if values.ndim else values


def _margin(logits, labels):
    """max_{i != label} logit_i - logit_label: (b,), positive where the class is another."""
    own = labels[:, None] == jnp.arange(logits.shape[1])
    return jnp.max(jnp.where(own, -jnp.inf, logits), axis=1) - jnp.sum(jnp.where(own, logits, 0.0), axis=1)


def _objective(name: str, logits, labels, targets):
    """What an attack ascends: (b,)."""
    if name == "margin":
        return _margin(logits, labels)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    if name == "cross_entropy":
        return jax.scipy.special.logsumexp(logits, axis=1) - own
    return jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0] - own


def _ascend(follow, logits: Callable, images, labels, epsilon, key, objective, num_targets, targets, restarts, box):
    """Runs `follow` from random starts, towards one target after another, and keeps the points of largest margin.

    follow: (gradient, inside, start) -> points and their `_margin`s. gradient: x -> (gradient of the objective, (its
    values, margins)). inside: the nearest point of the ball, moved into the box.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"Expected an objective of {OBJECTIVES}, got {objective!r}.")
    if restarts < 1 or num_targets < 1:
        raise ValueError(f"Expected at least one restart and one target, got {restarts} and {num_targets}.")
    epsilon, logits = _like(jnp.asarray(epsilon, images.dtype), images), of_images(logits)

    def inside(points):
        moved = images + project_l2(points - images, epsilon)
        # Clipping to the box moves every pixel towards the original one, so it stays in the ball.
        return moved if box is None else jnp.clip(moved, *box)

    chosen = labels[:, None] if targets is None else targets[:, None]
    if objective == "targeted_margin" and targets is None:
        out = logits(images)
        chosen = top_rivals(out, labels, max(1, min(num_targets, out.shape[1] - 1)))

    def run(i, carry):
        best, best_margin = carry
        target = chosen[:, i % chosen.shape[1]]
        start_key = jax.random.fold_in(key, i)

        def values(x):
            out = logits(x)
            found = _objective(objective, out, labels, target)
            return jnp.sum(found), (found, _margin(out, labels))

        noise = unit(jax.random.normal(start_key, images.shape, images.dtype))
        shares = jax.random.uniform(jax.random.fold_in(start_key, 1), images.shape[:1], images.dtype)
        start = inside(images + noise * _like(shares, images) * epsilon)
        points, margin = follow(jax.grad(values, has_aux=True), inside, start)
        better = margin > best_margin
        return jnp.where(_like(better, images), points, best), jnp.where(better, margin, best_margin)

    nothing = (images, jnp.full(images.shape[0], -jnp.inf, images.dtype))
    return jax.lax.stop_gradient(jax.lax.fori_loop(0, restarts * chosen.shape[1], run, nothing)[0])


def pgd_l2(
    logits: Callable,
    images: Float[Array, "b ..."],
    labels: Int[Array, " b"],
    epsilon,
    key: PRNGKeyArray,
    *,
    num_steps: int,
    relative_step: float = 2.5,
    restarts: int = 1,
    objective: str = "margin",
    num_targets: int = 9,
    targets: Int[Array, " b"] | None = None,
    box: Box = PIXELS,
) -> Float[Array, "b ..."]:
    """Projected gradient ascent from random starts.

    Args:
      logits: function of images, differentiable. images: inside the box. labels: (b,), the classes to move away from.
      epsilon: l2 radius, pixel units: a number, or (b,), one per image.
      relative_step: step length times num_steps / epsilon. restarts: number of starts.
      objective: "margin", max_{i != label} logit_i - logit_label; "cross_entropy"; "targeted_margin", logit_target -
        logit_label for the num_targets most likely rivals one after another, each with all steps and restarts, or for
        one rival that is given: targets (b,).
      box: lowest and highest pixel; None: pixels may take any value.
    Returns: images of the same shape within epsilon of the originals, at which the margin was largest; constant under
      differentiation, as adversarial training takes them.
    Raises: ValueError for an unknown objective and for counts below 1.
    Source: Madry et al. 2018, arXiv:1706.06083, with l2 steps.
    """
    length = relative_step / max(num_steps, 1) * _like(jnp.asarray(epsilon, images.dtype), images)

    def follow(gradient, inside, start):
        def body(_, carry):
            x, best, best_margin = carry
            direction, (_, margin) = gradient(x)
            better = margin > best_margin
            best, best_margin = jnp.where(_like(better, x), x, best), jnp.where(better, margin, best_margin)
            return inside(x + length * unit(direction)), best, best_margin

        nothing = jnp.full(images.shape[0], -jnp.inf, images.dtype)
        x, best, best_margin = jax.lax.fori_loop(0, num_steps, body, (start, images, nothing))
        margin = _margin(logits(x), labels)
        better = margin > best_margin
        return jnp.where(_like(better, x), x, best), jnp.where(better, margin, best_margin)

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
    key: PRNGKeyArray,
    *,
    num_steps: int,
    restarts: int = 1,
    objective: str = "margin",
    num_targets: int = 9,
    targets: Int[Array, " b"] | None = None,
    box: Box = PIXELS,
) -> Float[Array, "b ..."]:
    """Auto-PGD: ascent with momentum whose step, 2 epsilon at first, is halved where it has stopped to gain.

    At each of `checkpoints` an image's step is halved, and its search goes on from the best point so far, if less than
    three quarters of the steps since the last checkpoint raised the objective, or if neither the step length nor the
    best value has changed since then.

    Args, returns, raises: as `pgd_l2`.
    Source: Croce & Hein 2020, arXiv:2003.01690, Algorithm 1, with l2 steps along the normalised gradient.
    """
    scale = _like(jnp.asarray(epsilon, images.dtype), images)
    marks = [0, *checkpoints(num_steps)]
    # At each step the number of steps since the last checkpoint where it ends at one, else 0.
    stretches = np.zeros(max(num_steps, 1), np.int32)
    stretches[np.array(marks[1:], int) - 1] = np.diff(marks)

    def follow(gradient, inside, start):
        def body(step, state):
            x, last, direction, value = state["x"], state["last"], state["direction"], state["value"]
            ahead = inside(x + _like(state["length"], x) * scale * unit(direction))
            weight = jnp.where(step == 0, 1.0, _MOMENTUM).astype(x.dtype)
            moved = inside(x + weight * (ahead - x) + (1 - weight) * (x - last))
            new_direction, (new_value, margin) = gradient(moved)
            gains = state["gains"] + (new_value > value)
            higher = new_value > state["top_value"]
            top = jnp.where(_like(higher, x), moved, state["top"])
            top_direction = jnp.where(_like(higher, x), new_direction, state["top_direction"])
            top_value = jnp.where(higher, new_value, state["top_value"])
            better = margin > state["best_margin"]

            stretch = jnp.asarray(stretches)[step]
            looks_back = stretch > 0
            stuck = ~state["halved"] & (top_value <= state["mark_value"])
            halve = looks_back & ((gains < _GAINING * stretch) | stuck)
            return {
                "x": jnp.where(_like(halve, x), top, moved),
                "last": x,
                "direction": jnp.where(_like(halve, x), top_direction, new_direction),
                "value": jnp.where(halve, top_value, new_value),
                "length": jnp.where(halve, state["length"] / 2, state["length"]),
                "top": top,
                "top_direction": top_direction,
                "top_value": top_value,
                "best": jnp.where(_like(better, x), moved, state["best"]),
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


@dataclasses.dataclass(frozen=True)
class AttackResult:
    """The nearest misclassified point found for each image: its distance (inf if none), itself (or the image)."""

    distances: np.ndarray
    points: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Attack:
    """How images are attacked: what is static when an attack is compiled."""

    num_steps: int
    method: str
    restarts: int
    objective: str
    num_targets: int
    box: Box

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"Expected a method of {METHODS}, got {self.method!r}.")
        if self.num_steps < 0:
            raise ValueError(f"Expected num_steps of at least 0, got {self.num_steps}.")

    def __call__(self, network, x, y, epsilon, key, targets):
        attack = pgd_l2 if self.method == "pgd" else apgd_l2
        names = ("num_steps", "restarts", "objective", "num_targets", "box")
        return attack(network, x, y, epsilon, key, targets=targets, **{name: getattr(self, name) for name in names})


def _batches(images: np.ndarray, labels: np.ndarray, batch_size: int) -> Iterator[tuple[slice, int, Array, Array]]:
    """Rows, their number, and images and labels filled up with zeros to a full batch unless they all fit in one."""
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        count = len(images[rows])
        filling = [(0, batch_size - count if start else 0)]
        x = jnp.asarray(np.pad(images[rows], filling + [(0, 0)] * (images.ndim - 1)))
        yield rows, count, x, jnp.asarray(np.pad(labels[rows], filling))


def attack_l2(
    network,
    images: np.ndarray,
    labels: np.ndarray,
    radii,
    *,
    num_steps: int,
    seed: int = 0,
    batch_size: int = 256,
    method: str = "pgd",
    restarts: int = 1,
    objective: str = "margin",
    num_targets: int = 9,
    box: Box = PIXELS,
) -> AttackResult:
    """Attacks at each radius and keeps, for each image, the nearest point that does not get the image's label.

    The way to a point that was found is shortened by bisection, to 0.4 % of its length.

    Args:
      network: a pytree that is called on pixels, such as a Network in float32.
      images: (n, ...), inside the box. labels: (n,).
      radii: l2, pixel units. num_steps: at each radius; 0 only looks at the images themselves.
      method: "pgd" (`pgd_l2`) or "apgd" (`apgd_l2`), where the other options are explained.
    Raises: ValueError as these, and for another method.
    """
    attack = _Attack(num_steps, method, restarts, objective, num_targets, box)
    distances = np.full(len(images), np.inf)
    points = np.array(images)
    for rows, count, x, y in _batches(images, labels, batch_size):
        best, found = x, _misclassified(network, x, y)
        for i, radius in enumerate(sorted(radii) if num_steps else ()):
            if bool(found[:count].all()):
                break
            epsilon = jnp.full(len(x), radius, x.dtype)
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), rows.start), i)
            moved, wrong, _ = _attack_batch(network, x, y, epsilon, key, None, attack=attack)
            best, found = jnp.where(_like(wrong & ~found, x), moved, best), found | wrong
        if bool(found.any()):
            best = _shorten(network, x, best, y)
        flags = np.asarray(found)[:count]
        moved = np.where(_like(flags, images[rows]), np.asarray(best)[:count], images[rows])
        points[rows], distances[rows] = moved, np.where(flags, lengths(moved, images[rows]), np.inf)
    return AttackResult(distances, points)


def attack_within(
    network,
    images: np.ndarray,
    labels: np.ndarray,
    radii: np.ndarray,
    *,
    num_steps: int,
    seed: int = 0,
    batch_size: int = 256,
    method: str = "apgd",
    restarts: int = 1,
    objective: str = "margin",
    num_targets: int = 9,
    targets: np.ndarray | None = None,
    box: Box = PIXELS,
) -> tuple[np.ndarray, np.ndarray]:
    """Attacks each image within a radius of its own: the test of a certificate.

    Args: as `attack_l2`, but radii: (n,), one per image; labels: (n,), the classes that must not change; targets: (n,),
      for "targeted_margin", the rival of each.
    Returns: for each image the point (n, ...) within its radius at which the margin was largest, and that margin (n,),
      max_{i != label} logit_i - logit_label, in the network's precision: positive where the class is another.
    Raises: ValueError as `attack_l2`, and for radii that are negative or NaN.
    """
    attack = _Attack(num_steps, method, restarts, objective, num_targets, box)
    if not (np.asarray(radii) >= 0).all():
        raise ValueError("Expected radii of at least 0, got negative ones or NaN.")
    if box is not None:  # nothing in the box is further away; a certificate's largest number is infinite in float32
        radii = np.minimum(radii, (box[1] - box[0]) * np.prod(images.shape[1:]) ** 0.5)
    points, margins = np.array(images), np.full(len(images), -np.inf)
    for rows, count, x, y in _batches(images, labels, batch_size):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), rows.start), 2**31 - 1)
        epsilon = jnp.asarray(np.pad(radii[rows], (0, len(x) - count)), x.dtype)
        rivals = None if targets is None else jnp.asarray(np.pad(targets[rows], (0, len(x) - count)))
        moved, _, margin = _attack_batch(network, x, y, epsilon, key, rivals, attack=attack)
        points[rows], margins[rows] = np.asarray(moved)[:count], np.asarray(margin)[:count]
    return points, margins


def lengths(points: np.ndarray, images: np.ndarray) -> np.ndarray:
    """|point - image|_2 of each pair, in float64: (n,)."""
    return np.sqrt(((points.astype(np.float64) - images) ** 2).sum(axis=tuple(range(1, images.ndim))))


@jax.jit
def _misclassified(network, x, y):
    return jnp.argmax(network(x), axis=1) != y


@functools.partial(jax.jit, static_argnames="attack")
def _attack_batch(network, x, y, epsilon, key, targets, *, attack):
    moved = attack(network, x, y, epsilon, key, targets)
    out = network(moved)
    return moved, jnp.argmax(out, axis=1) != y, _margin(out, y)


@jax.jit
def _shorten(network, x, moved, y):
    """Points between x and misclassified ones, themselves misclassified, nearer to where the class changes."""

    def halve(_, ends):
        right, wrong = ends
        middle = (right + wrong) / 2
        still = _like(jnp.argmax(network(middle), axis=1) != y, x)
        return jnp.where(still, right, middle), jnp.where(still, middle, wrong)

    return jax.lax.fori_loop(0, _HALVINGS, halve, (x, moved))[1]


__all__ = [
    "METHODS",
    "OBJECTIVES",
    "AttackResult",
    "LipschitzSearch",
    "apgd_l2",
    "attack_l2",
    "attack_within",
    "checkpoints",
    "lengths",
    "lipschitz_lower_bound",
    "pgd_l2",
    "project_l2",
]
