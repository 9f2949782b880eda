"""Attacks on many images: members of an ensemble one after the other, each on what the earlier ones have not broken."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lipjax.attacks.pgd import OBJECTIVES, PIXELS, TARGETED, Box, apgd_l2, like, margin_of, pgd_l2
from lipjax.attacks.square import square_l2

METHODS = ("ensemble", "apgd", "pgd", "square")
_HALVINGS = 8  # a point that was found is moved towards the image until the way is known to one part in 2^this
_PART = 8  # batches have this part of the full size where so many images suffice: programs of two shapes
_WITHIN = 1 + 1e-6  # what counts as within a radius, since points are found in single precision

Watch = Callable[[float], None]


@dataclasses.dataclass(frozen=True)
class AttackResult:
    """The nearest misclassified point found for each image.

    Attributes:
      distances: (n,), inf if none was found. points: (n, ...), or where none was found the image.
      found_by: (n,) places in `ways`, -1 where nothing was found or the image itself has another class.
      ways: what found points: "method", "seed", "restart"; "queries" of square, of others "objective", "steps" and,
        where they aim at a class, its rank among the likeliest ones, "rival".
    """

    distances: np.ndarray
    points: np.ndarray
    found_by: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, int))
    ways: tuple[dict, ...] = ()

    def nearer(self, other: "AttackResult") -> "AttackResult":
        """Of each image the nearer of two points, with how it was found."""
        closer = other.distances < self.distances
        found_by = np.where(other.found_by < 0, -1, other.found_by + len(self.ways))
        return AttackResult(
            np.where(closer, other.distances, self.distances),
            np.where(like(closer, self.points), other.points, self.points),
            np.where(closer, found_by, self.found_by),
            self.ways + other.ways,
        )


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """One start of one member of an attack: its rank among the rivals, if it aims at one, and the restart."""

    method: str
    objective: str
    rank: int
    restart: int

    def way(self, options: "_Options", seed: int) -> dict:
        found = {"method": self.method, "seed": seed, "restart": self.restart}
        if self.method == "square":
            return found | {"queries": options.num_queries}
        found |= {"objective": self.objective, "steps": options.num_steps}
        return found | {"rival": self.rank + 1} if self.objective in TARGETED else found


@dataclasses.dataclass(frozen=True)
class _Options:
    """Settings of an attack on images."""

    num_steps: int
    method: str
    restarts: int
    objective: str
    num_targets: int
    num_queries: int
    box: Box

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"Expected a method of {METHODS}, got {self.method!r}.")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"Expected an objective of {OBJECTIVES}, got {self.objective!r}.")
        if self.num_steps < 0:
            raise ValueError(f"Expected num_steps of at least 0, got {self.num_steps}.")
        counts = self.restarts, self.num_targets, self.num_queries
        if min(counts) < 1:
            raise ValueError(f"Expected at least one restart, one target and one query, got {counts}.")

    def attempts(self, num_classes: int, ranks: bool = True) -> list[_Attempt]:
        """All starts of all members, in their order. ranks: False: the rival of each image is given."""
        members = [(self.method, self.objective)]
        if self.method == "ensemble":
            members = [("apgd", "cross_entropy"), ("apgd", "targeted_dlr"), ("square", "margin")]
        found, rivals = [], max(1, min(self.num_targets, num_classes - 1))
        for method, objective in members:
            aims = method != "square" and objective in TARGETED and ranks
            for restart in range(self.restarts):
                for rank in range(rivals if aims else 1):
                    found.append(_Attempt(method, "margin" if method == "square" else objective, rank, restart))
        return found

    def run(self, network, attempt: _Attempt, x, y, epsilon, targets, keys):
        """Points, whether they have another class, and their margins."""
        if attempt.method == "square":
            return _square(network, x, y, epsilon, keys, num_queries=self.num_queries, box=self.box)
        place = jnp.int32(OBJECTIVES.index(attempt.objective))
        static = {"method": attempt.method, "num_steps": self.num_steps, "box": self.box}
        return _gradient(network, x, y, epsilon, keys, targets, place, **static)


def batches(rows: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """The rows in batches, each filled up by its first row to `batch_size` or an eighth of it; and its own number."""
    small = -(-batch_size // _PART)
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        size = small if len(part) <= small else batch_size
        yield np.concatenate([part, np.full(size - len(part), part[0])]), len(part)


def _keys(seed: int, attempt: _Attempt, numbers: np.ndarray):
    """A key for each image, which depends on nothing but seed, attempt and number."""
    which = METHODS.index(attempt.method), OBJECTIVES.index(attempt.objective), attempt.rank, attempt.restart
    return _fold(jax.random.key(seed), jnp.asarray(which, jnp.uint32), jnp.asarray(numbers, jnp.uint32))


@jax.jit
def _fold(key, which, numbers):
    for i in range(len(which)):
        key = jax.random.fold_in(key, which[i])
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)


def attack_l2(
    network,
    images: np.ndarray,
    labels: np.ndarray,
    radii,
    *,
    num_steps: int,
    seed: int = 0,
    batch_size: int = 256,
    method: str = "ensemble",
    restarts: int = 1,
    objective: str = "cross_entropy",
    num_targets: int = 9,
    num_queries: int = 1000,
    box: Box = PIXELS,
    numbers: np.ndarray | None = None,
    watch: Watch | None = None,
) -> AttackResult:
    """Attacks at each radius and keeps, for each image, the nearest point that does not get the image's label.

    The largest radius comes first. The way to a point that was found is shortened by bisection, to 0.4 % of its length;
    smaller radii are tried only on images of which the nearest point is still further away. At each radius every start
    of every member attacks only images that no earlier one has broken there.

    Args:
      network: a pytree that is called on pixels, such as a Network in float32.
      images: (n, ...), pixels, inside the box.
      labels: (n,) integers.
      radii: l2, pixel units.
      num_steps: of gradients, at each radius; 0: only the images themselves are looked at.
      seed: of the random numbers.
      batch_size: images attacked at a time.
      method: "apgd" (`apgd_l2`) or "pgd" (`pgd_l2`), with `objective`; "square" (`square_l2`); or "ensemble": Auto-PGD
        on the cross-entropy, then on the targeted difference-of-logits ratio, then Square. As AutoAttack, without FAB,
        whose nearest points several radii and the bisection take the place of.
      restarts: number of starts of each member.
      objective: of "apgd" and "pgd", as in `pgd_l2`.
      num_targets: most likely rivals that targeted objectives aim at.
      num_queries: of "square".
      box: lowest and highest pixel; None: pixels may take any value.
      numbers: (n,), of the images, from which their random numbers come; default: 0 to n - 1.
      watch: called with the fraction that is done, now and then.
    Returns: AttackResult.
    Raises: ValueError for another method or objective and for counts below 1 (num_steps: below 0).
    Source: Croce & Hein 2020, arXiv:2003.01690, section 6.
    Example: logits that are the pixels, and a tie 0.354 away.
      >>> head = lipjax.operators.LinearHead(jnp.eye(2), jnp.zeros(2))
      >>> network = lipjax.network.make_network([("dense", lipjax.operators.Dense(jnp.eye(2)))], head)
      >>> image, label = np.array([[0.75, 0.25]]), np.array([0])
      >>> result = lipjax.attacks.attack_l2(network, image, label, [0.2, 0.4], num_steps=10, method="pgd")
      >>> bool(0.35 < result.distances[0] < 0.4)
      True
    """
    options = _Options(num_steps, method, restarts, objective, num_targets, num_queries, box)
    numbers = np.arange(len(images)) if numbers is None else np.asarray(numbers)
    distances, points = np.full(len(images), np.inf), np.array(images)
    found_by, ways = np.full(len(images), -1), []
    logits = _all_logits(network, images, batch_size)
    # A NaN logit is argmax's choice, here and where points are looked at.
    distances[np.argmax(logits, axis=1) != labels] = 0.0
    attempts = options.attempts(logits.shape[1])
    rivals = _rivals(logits, labels)
    radii = sorted(radii, reverse=True) if num_steps else []
    for number, radius in enumerate(radii):
        for place, attempt in enumerate(attempts):
            rows = np.flatnonzero(distances > radius * _WITHIN)
            if number:  # what survives a larger radius is left alone
                rows = rows[np.isfinite(distances[rows])]
            ways.append(attempt.way(options, seed))
            for start, (part, count) in enumerate(batches(rows, batch_size)):
                x, y = jnp.asarray(images[part]), jnp.asarray(labels[part])
                epsilon = jnp.full(len(part), radius, x.dtype)
                targets = jnp.asarray(rivals[part, min(attempt.rank, rivals.shape[1] - 1)])
                keys = _keys(seed, attempt, numbers[part])
                moved, wrong, _ = options.run(network, attempt, x, y, epsilon, targets, keys)
                wrong = np.asarray(wrong)[:count]
                if wrong.any():
                    nearest = np.asarray(_shorten(network, x, moved, y))[:count][wrong]
                    own = part[:count][wrong]
                    far = lengths(nearest, images[own])
                    better = far < distances[own]
                    own, nearest, far = own[better], nearest[better], far[better]
                    points[own], distances[own], found_by[own] = nearest, far, len(ways) - 1
                if watch is not None:
                    done = min(1.0, (start + 1) * batch_size / len(rows))
                    watch((number + (place + done) / len(attempts)) / len(radii))
    return AttackResult(distances, points, found_by, tuple(ways))


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
    objective: str = "cross_entropy",
    num_targets: int = 9,
    num_queries: int = 1000,
    targets: np.ndarray | None = None,
    box: Box = PIXELS,
    numbers: np.ndarray | None = None,
    watch: Watch | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attacks each image within a radius of its own: the test of a certificate.

    Args: as `attack_l2`, but radii: (n,), one per image; labels: (n,), the classes that must not change; targets: (n,),
      the rival of each, for objectives that aim at one.
    Returns: for each image the point (n, ...) within its radius at which the margin was largest, and that margin (n,),
      max_{i != label} logit_i - logit_label, in the network's precision: positive where the class is another.
    Raises: ValueError as `attack_l2`, and for radii that are negative or NaN.
    """
    options = _Options(num_steps, method, restarts, objective, num_targets, num_queries, box)
    if not (np.asarray(radii) >= 0).all():
        raise ValueError("Expected radii of at least 0, got negative ones or NaN.")
    if box is not None:  # nothing in the box is further away; a certificate's largest number is infinite in float32
        radii = np.minimum(radii, (box[1] - box[0]) * np.prod(images.shape[1:]) ** 0.5)
    numbers = np.arange(len(images)) if numbers is None else np.asarray(numbers)
    points, margins = np.array(images), np.full(len(images), -np.inf)
    if not len(images):
        return points, margins
    rivals = _rivals(_all_logits(network, images, batch_size), labels) if targets is None else targets[:, None]
    attempts = options.attempts(rivals.shape[1] + 1, ranks=targets is None)
    for place, attempt in enumerate(attempts):
        for start, (part, count) in enumerate(batches(np.arange(len(images)), batch_size)):
            x, y = jnp.asarray(images[part]), jnp.asarray(labels[part])
            aims = jnp.asarray(rivals[part, min(attempt.rank, rivals.shape[1] - 1)])
            epsilon, keys = jnp.asarray(radii[part], x.dtype), _keys(seed, attempt, numbers[part])
            moved, _, found = (np.asarray(a)[:count] for a in options.run(network, attempt, x, y, epsilon, aims, keys))
            own = part[:count]
            # A NaN, which would never be the larger one, is told as it is.
            better = (found > margins[own]) | np.isnan(found)
            points[own[better]], margins[own[better]] = moved[better], found[better]
            if watch is not None:
                watch((place + min(1.0, (start + 1) * batch_size / len(images))) / len(attempts))
    return points, margins


def evaluate_points(network, images, labels, points, batch_size: int = 256) -> np.ndarray:
    """The distance of each point from its image where it does not get the image's label, otherwise inf: (n,)."""
    wrong = np.argmax(_all_logits(network, points, batch_size), axis=1) != labels
    return np.where(wrong, lengths(points, images), np.inf)


def lengths(points: np.ndarray, images: np.ndarray) -> np.ndarray:
    """|point - image|_2 of each pair, in float64: (n,)."""
    return np.sqrt(((points.astype(np.float64) - images) ** 2).sum(axis=tuple(range(1, images.ndim))))


def _rivals(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The other classes of each image by decreasing logit: (n, k - 1); of a single class the label itself."""
    others = np.array(logits, np.float64)
    others[np.arange(len(labels)), labels] = -np.inf
    order = np.argsort(-others, axis=1, kind="stable")
    return order[:, : max(1, logits.shape[1] - 1)].astype(np.int32)


def _all_logits(network, images: np.ndarray, batch_size: int) -> np.ndarray:
    parts = []
    for part, count in batches(np.arange(len(images)), batch_size):
        parts.append(np.asarray(_logits(network, jnp.asarray(images[part])))[:count])
    return np.concatenate(parts) if parts else np.empty((0, 1), np.float32)


@jax.jit
def _logits(network, x):
    return network(x)


def _judged(network, moved, y):
    out = network(moved)
    return moved, jnp.argmax(out, axis=1).astype(y.dtype) != y, margin_of(out, y)


@functools.partial(jax.jit, static_argnames=("method", "num_steps", "box"))
def _gradient(network, x, y, epsilon, keys, targets, objective, *, method, num_steps, box):
    # The objective is data, not a part of the program: all members that follow gradients are compiled once.
    attack = pgd_l2 if method == "pgd" else apgd_l2
    options = {"num_steps": num_steps, "objective": objective, "targets": targets, "box": box}
    return _judged(network, attack(network, x, y, epsilon, keys, **options), y)


@functools.partial(jax.jit, static_argnames=("num_queries", "box"))
def _square(network, x, y, epsilon, keys, *, num_queries, box):
    return _judged(network, square_l2(network, x, y, epsilon, keys, num_queries=num_queries, box=box), y)


@jax.jit
def _shorten(network, x, moved, y):
    """Points between x and misclassified ones, themselves misclassified, nearer to where the class changes."""

    def halve(_, ends):
        right, wrong = ends
        middle = (right + wrong) / 2
        still = like(jnp.argmax(network(middle), axis=1).astype(y.dtype) != y, x)
        return jnp.where(still, right, middle), jnp.where(still, middle, wrong)

    return jax.lax.fori_loop(0, _HALVINGS, halve, (x, moved))[1]


__all__ = ["METHODS", "AttackResult", "attack_l2", "attack_within", "evaluate_points", "lengths"]
