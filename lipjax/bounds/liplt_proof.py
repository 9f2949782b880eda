"""LipLT with proved norms: the recursion of `sweeps`, rounded upwards, in NumPy float64."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import numpy as np
from threadpoolctl import threadpool_limits

from lipjax import spectral
from lipjax.bounds import chains as chain_proofs
from lipjax.bounds import host_map
from lipjax.bounds.host_map import HostMap
from lipjax.bounds.liplt_path import Step
from lipjax.errors import NotCertifiable
from lipjax.numerics import ENLARGEMENT, ROOM, check_terms, gamma
from lipjax.operators import Conv, Flatten
from lipjax.operators.heads import distance_bounds
from lipjax.spectral.arithmetic import check_rounding, exact_float64
from lipjax.spectral.verified import float_up, parallel_map

_PRODUCT = "product"
# Chains that are proved at the same time: each may take some GiB.
_AT_ONCE = 4

# Rows (k, n) of the output, carried back to somewhere, and a bound (k,) on the error of each.
Rows = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ChainBound:
    """Proved norm of one linear chain: from the input or after the activation `start`, to before activation `end`.

    Attributes:
      start, end: names of layers; start "input" for the first.
      claimed ("bound" in files), method, details: as of an operator. For products of bounds, details["estimate"] is a
        power iteration's lower estimate: claimed / estimate - 1 is at most how loose the product is.
    """

    start: str
    end: str
    claimed: float
    method: str
    details: dict


@dataclasses.dataclass(frozen=True)
class LayerConstant:
    """Proved Lipschitz constant from the input to what an activation acts on, and the product of norms up to there.

    "bound" in files is what is `claimed` here.
    """

    name: str
    claimed: float
    product: float


@dataclasses.dataclass(frozen=True)
class LipLTReport:
    """A report of how the constants were proved.

    Attributes:
      layers: one row per activation, in order.
      chains: every chain that ends before an activation.
      per_class: (k,) proved constants of the outputs one by one.
      total: proved constant of the whole output.
      product: proved constant of the whole output by the product of norms alone.
      pairwise_method: "rows", or "last layer" where there are more outputs than rows are carried back for.
    """

    layers: tuple[LayerConstant, ...]
    chains: tuple[ChainBound, ...]
    per_class: np.ndarray
    total: float
    product: float
    pairwise_method: str


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A piece of the path with proved numbers, as exact fractions.

    For a linear operator: `map` (None if it is not composed) and `norm`. For an activation: `a`, `b`, `top` =
    max(|alpha|, |beta|), the maps and norms of W, G and H, and of the linear part H + a G W.
    """

    step: Step
    norm: Fraction = Fraction(1)
    map: HostMap | None = None
    a: Fraction = Fraction(0)
    b: Fraction = Fraction(0)
    top: Fraction = Fraction(0)
    inner: Any = None
    outer: Any = None
    skip: Any = None


def _operator_norm(name: str, op) -> Fraction:
    for leaf in jax.tree.leaves(op):
        exact_float64(leaf, f"{name} ({type(op).__name__})")
    for shape in (op.in_shape, op.out_shape):
        check_terms(math.prod(shape), f"{name} ({type(op).__name__})")
    try:
        found = op.bound()
    except AttributeError as error:
        raise NotCertifiable(f"{name}: no proved Lipschitz bound is known for a {type(op).__name__}.") from error
    except ValueError as error:
        raise NotCertifiable(f"{name} ({type(op).__name__}): {error}") from error
    return Fraction(found.claimed)


def _group(name: str, ops: Sequence, shape) -> tuple[Fraction, HostMap | None]:
    """The proved norm of operators in turn, and the map they make."""
    norms = [_operator_norm(name, op) for op in ops]
    maps = [host_map.host_map(op, float_up(norm)) for op, norm in zip(ops, norms, strict=True)]
    whole = None if None in maps else host_map.sequence([m for m in maps if m is not None], shape)
    return math.prod(norms, start=Fraction(1)), whole


def _piece(step: Step) -> _Piece:
    if step.block is None:
        norm, whole = _group(step.name, (step.op,), step.shape)
        return _Piece(step, norm, whole)
    low, high = (Fraction(s) for s in step.block.slope)
    a, b, top = (low + high) / 2, (high - low) / 2, max(abs(low), abs(high))
    if step.is_plain:
        return _Piece(step, abs(a), None, a, b, top)
    block = step.block
    inner = _group(step.name, block.inner, step.shape)
    outer = _group(step.name, block.outer, step.inner_shape)
    skip = None if block.skip is None else _group(step.name, block.skip, step.shape)
    norm = abs(a) * inner[0] * outer[0] + (0 if skip is None else skip[0])
    through = None
    maps = [inner[1], outer[1]] + ([] if skip is None else [skip[1]])
    if float(a) == a and None not in maps:
        both = host_map.sequence([m for m in maps[:2] if m is not None], step.shape)
        zero = HostMap(_zeros(both.out_shape), _zeros(both.in_shape), both.in_shape, both.out_shape, 0.0, 0.0, 0.0)
        through = host_map.weighted_sum(maps[2] or zero if skip else zero, float(a), both)
        composed = _proved(chain_proofs.composition_bound, [through])
        if composed is not None:
            norm = min(norm, Fraction(composed.proved))
        through = dataclasses.replace(through, norm=float_up(norm))
    return _Piece(step, norm, through, a, b, top, inner, outer, skip)


def _zeros(shape):
    return lambda x: np.zeros((len(x), *shape))


def _proved(prove: Callable[[Any], spectral.NormBound | None], chain: Any) -> spectral.NormBound | None:
    """The result of `prove`, or None where it has no proof."""
    try:
        return prove(chain)
    except NotCertifiable:
        return None


class LipLTBound:
    """All proved numbers of one path. Chains from start 0 (the input) or j (after activation j) to activation k."""

    def __init__(self, path: Sequence[Step]):
        check_rounding()
        # Set here, before any thread: limits that threads set and restore at the same time would not nest.
        with threadpool_limits(limits=1, user_api="blas"):
            self.pieces = parallel_map(_piece, path)
            self.acts = [i for i, piece in enumerate(self.pieces) if piece.step.block is not None]
            self._product()
            self.chains = self._chain_bounds()
        self._constants()

    def _name(self, start: int) -> str:
        return "input" if start == 0 else self.pieces[self.acts[start - 1]].step.name

    def _between(self, start: int, end: int | None) -> list[_Piece]:
        """The pieces between start and activation `end`, or the output for None."""
        first = 0 if start == 0 else self.acts[start - 1] + 1
        return self.pieces[first : len(self.pieces) if end is None else self.acts[end - 1]]

    def _sides(self, start: int, end: int) -> tuple[list, list]:
        """The maps at a chain's ends: G of the activation where it starts, W of the one where it ends."""
        head = [] if start == 0 else [self.pieces[self.acts[start - 1]].outer]
        tail = [self.pieces[self.acts[end - 1]].inner]
        return [x for x in head if x is not None], [x for x in tail if x is not None]

    def _gain(self, start: int, end: int | None) -> Fraction:
        """The product of |a| of the plain activations on the way; those of blocks are in their maps."""
        return math.prod((p.norm for p in self._between(start, end) if p.step.is_plain), start=Fraction(1))

    def _product(self) -> None:
        """p, the product of norms up to every activation, and to the output, rounded upwards."""
        self.products, p = [], Fraction(1)
        for piece in self.pieces:
            if piece.step.block is None:
                p = piece.norm * p
            elif piece.step.is_plain:
                self.products.append(p)
                p = piece.top * p
            else:
                m = piece.inner[0] * p
                self.products.append(m)
                p = (0 if piece.skip is None else piece.skip[0]) * p + piece.top * piece.outer[0] * m
            p = Fraction(float_up(p))
        self.product = float_up(p)

    def _chain_bounds(self) -> dict[tuple[int, int], ChainBound]:
        pairs = [(j, k) for k in range(1, len(self.acts) + 1) for j in range(k)]
        found = dict(zip(pairs, parallel_map(lambda pair: self._direct(*pair), pairs, _AT_ONCE), strict=True))
        # Shorter chains first: a long one may be a product of what is proved of its parts.
        for j, k in sorted(pairs, key=lambda pair: pair[1] - pair[0]):
            for split in range(j + 1, k):
                if not self.pieces[self.acts[split - 1]].step.is_plain:
                    continue
                value = float_up(Fraction(found[j, split].claimed) * Fraction(found[split, k].claimed))
                if value < found[j, k].claimed:
                    parts = f"{_PRODUCT} of the bounds to and from {self._name(split)}"
                    details = {"split": self._name(split)}
                    found[j, k] = ChainBound(self._name(j), self._name(k), value, parts, details)
        for (j, k), chain in found.items():
            maps = self._maps(j, k)
            if chain.method.startswith(_PRODUCT) and maps and self._gain(j, k):
                details = {**chain.details, "estimate": chain_proofs.lower_estimate(maps)}
                found[j, k] = dataclasses.replace(chain, details=details)
        return found

    def _maps(self, j: int, k: int) -> list[HostMap] | None:
        """The maps of a chain, without those that only reshape; None if one is not composed."""
        head, tail = self._sides(j, k)
        maps = [m for _, m in head]
        maps += [p.map for p in self._between(j, k) if not p.step.is_plain]
        maps += [m for _, m in tail]
        return None if any(m is None for m in maps) else maps

    def _direct(self, j: int, k: int) -> ChainBound:
        """The least of the product of the chain's norms and, where it matters, what is proved of the composition."""
        head, tail = self._sides(j, k)
        between = [p for p in self._between(j, k) if not p.step.is_plain]
        norms = [n for n, _ in (*head, *tail)] + [p.norm for p in between]
        value = float_up(math.prod(norms, start=Fraction(1)))
        best = ChainBound(self._name(j), self._name(k), value, f"{_PRODUCT} of the norms of its operators", {})
        ops = [p.step.op for p in between if not isinstance(p.step.op, Flatten)]
        if len(norms) - (len(between) - len(ops)) <= 1:
            return dataclasses.replace(best, method="norm of the only operator")
        if not self._gain(j, k):  # slopes between -b and b: no constant reads it
            return best
        composed = None
        if not (head or tail) and all(isinstance(op, Conv) and op.padding == "CIRCULAR" for op in ops):
            composed = _proved(chain_proofs.circular_bound, ops)
        maps = self._maps(j, k)
        if composed is None and maps is not None:
            composed = _proved(chain_proofs.composition_bound, maps)
        if composed is None or spectral.with_room(composed.proved) >= value:
            return best
        return ChainBound(best.start, best.end, spectral.with_room(composed.proved), composed.method, composed.details)

    def _constants(self) -> None:
        """m_k of every activation, and the Lipschitz constants of the path up to after the last one, and to its end."""
        chains = {pair: Fraction(chain.claimed) for pair, chain in self.chains.items()}
        self.constants: list[Fraction] = []
        self.reach = Fraction(1)
        p, k = Fraction(1), 0
        for piece in self.pieces:
            if piece.step.block is None:
                p = piece.norm * p
            else:
                k += 1
                transformed = self._gain(0, k) * chains[0, k]
                for j in range(1, k):
                    b = self.pieces[self.acts[j - 1]].b
                    transformed += b * self._gain(j, k) * chains[j, k] * self.constants[j - 1]
                inner = Fraction(1) if piece.inner is None else piece.inner[0]
                m = min(transformed, inner * p)
                if k > 1 and self.pieces[self.acts[k - 2]].step.is_plain:
                    m = min(m, self.pieces[self.acts[k - 2]].top * self.constants[-1] * chains[k - 1, k])
                m = Fraction(float_up(m))
                self.constants.append(m)
                if piece.step.is_plain:
                    p = piece.top * m
                else:
                    skip = Fraction(0) if piece.skip is None else piece.skip[0]
                    outer = piece.outer[0]
                    p = min(skip * p + piece.top * outer * m, piece.norm * p + piece.b * outer * m)
            p = Fraction(float_up(p))
            if piece.step.block is not None:
                self.reach = p
        self.end = p

    def carried_rows(self, all_starts: bool) -> tuple[list[Rows | None], Rows | None]:
        """Rows of the output at every start, and at the output of the last activation's piece (the input without one).

        all_starts: False for the latter alone. None where an operator on the way is not composed, or where numbers
        leave the range of `distance_bounds`.
        """
        size = math.prod(self.pieces[-1].step.out_shape)
        x = np.eye(size).reshape(size, *self.pieces[-1].step.out_shape)
        error = np.zeros(size)
        start = len(self.acts)
        found: list[Rows | None] = [None] * (start + 1)
        last = None

        def kept(value, error) -> Rows | None:
            fits = np.abs(value).max() < 2.0**1000 and error.max() < 2.0**1000
            return (value.reshape(size, -1), error) if fits else None

        for piece in reversed(self.pieces):
            if piece.step.block is not None:
                if start == len(self.acts):
                    last = kept(x, error)
                    if not all_starts:
                        return found, last
                if piece.outer is None:
                    found[start] = kept(x, error)
                elif piece.outer[1] is not None:
                    found[start] = kept(*host_map.carry([piece.outer[1].transposed], x, error))
                start -= 1
            if piece.step.is_plain:
                continue
            if piece.map is None:
                return found, last
            x, error = host_map.carry([piece.map.transposed], x, error)
        found[0] = kept(x, error)
        return found, last if self.acts else found[0]

    def _sum(self, measure: Sequence[Any]) -> Any:
        """The recursion at the output: measure[s] bounds what start s contributes, entry by entry; rounded upwards."""
        total = _times(self._gain(0, None), measure[0])
        for j in range(1, len(self.acts) + 1):
            weight = self.pieces[self.acts[j - 1]].b * self._gain(j, None) * self.constants[j - 1]
            total = total + _times(weight, measure[j])
        return total * (1 + gamma(4 * len(measure) + 4))

    def outputs(self, max_rows: int) -> tuple[np.ndarray, LipLTReport]:
        """Pairwise constants (k, k), and the report."""
        count = math.prod(self.pieces[-1].step.out_shape)
        rows, last = self.carried_rows(count <= max_rows)
        pairwise = per_class = np.full(1, np.inf)
        total = np.inf
        method = "last layer"
        if all(entry is not None for entry in rows):
            method = "rows"
            known = [entry for entry in rows if entry is not None]
            pairwise = self._sum([_pair_bounds(*entry) for entry in known])
            per_class = self._sum([host_map.row_norms(u) + e for u, e in known])
            norms = [np.array(spectral.matrix_norm_bound(u).proved + host_map.frobenius(e)) for u, e in known]
            total = float(self._sum(norms))
        if last is not None:
            # From the features after the last activation on, the map is linear: b plays no part.
            upwards = 1 + gamma(4)
            pairwise = np.minimum(pairwise, _times(self.reach, _pair_bounds(*last)) * upwards)
            lengths = host_map.row_norms(last[0]) + last[1]
            per_class = np.minimum(per_class, _times(self.reach, lengths) * upwards)
            norm = np.array(spectral.matrix_norm_bound(last[0]).proved + host_map.frobenius(last[1]))
            total = min(total, float(_times(self.reach, norm) * upwards))
        # Without rows the whole constant serves: sqrt(2) of it for a difference of two outputs.
        total = min(total, float(self.end))
        per_class = np.minimum(np.broadcast_to(per_class, count), total)
        whole = float(_times(Fraction(math.sqrt(2)), np.array(total))) * ENLARGEMENT
        pairwise = np.minimum(np.broadcast_to(pairwise, (count, count)), whole)
        pairwise = np.minimum(pairwise, (per_class[:, None] + per_class) * ENLARGEMENT)
        # With room for the rounding errors of other products with the rows.
        pairwise = np.maximum(pairwise, pairwise.T) * (1 + float(ROOM))
        pairwise = np.where(np.eye(count, dtype=bool), 0.0, pairwise)
        names = [self.pieces[i].step.name for i in self.acts]
        layers = tuple(
            LayerConstant(name, float_up(m), float_up(product))
            for name, m, product in zip(names, self.constants, self.products, strict=True)
        )
        return pairwise, LipLTReport(layers, tuple(self.chains.values()), per_class, total, self.product, method)


def _times(weight: Fraction, measure: np.ndarray) -> np.ndarray:
    """The product, not below the exact one even where it underflows; 0 if a factor is. measure: finite, or infinite."""
    factor = float_up(weight)
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.nextafter(factor * measure, np.inf)
    return np.where((measure > 0) & (factor > 0), product, 0.0)


def _pair_bounds(rows: np.ndarray, errors: np.ndarray) -> np.ndarray:
    return (distance_bounds(rows) + errors[:, None] + errors) * ENLARGEMENT
