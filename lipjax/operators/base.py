"""The protocol of operators: what each of them gives, what some can besides, and the decorator that makes pytrees.

`Operator` is the base of all. A capability is a class, too, and code that needs it asks `isinstance(op, Bounded)`: an
operator without it is refused by name, never taken for something harmless.

    Bounded      bound(): the proved norm
    Estimated    estimate(v, num_iters): the norm by power iteration, for training
    Linear       a linear map: Estimated, and adjoint(y)
    Factor       a linear map that is stored once and applied twice, forward and back: Linear and Bounded
    Isometric    1-Lipschitz by construction: Bounded
    Reordering   moves numbers, appends zeros or leaves numbers out: Isometric, and adjoint(y)
    Elementwise  an activation of slopes in an interval, which loop transformation takes: Bounded
    Composite    made of other operators, its parts(), which every walk over a network enters
    Head         the last operator: pairs of classes are bounded instead of a norm
"""

import abc
import dataclasses
import math
import numbers
from fractions import Fraction
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lipjax import spectral
from lipjax.errors import NotCertifiable
from lipjax.operators.chain import bound_row, check_chain
from lipjax.spectral.arguments import Bounded, Estimated
from lipjax.spectral.verified import float_up

# A field that holds an array: a JAX array, a NumPy array once frozen, or what a tree transformation puts in its place.
Leaf = Any


class Operator(abc.ABC):
    """A piece of a network: a map of batches of one shape to batches of another.

    Attributes:
      in_shape, out_shape: of one input and its output, without the batch axis; static.
      nonexpansive: a promise of who made the operator that its norm is at most 1, so that training estimates none. No
        bound relies on it.
    """

    in_shape: tuple[int, ...]
    out_shape: Any  # a property of most classes
    nonexpansive = False
    _later: tuple[str, ...] = ()  # of `operator`

    @abc.abstractmethod
    def __call__(self, x) -> Any:
        """The output (b, *out_shape) of a batch (b, *in_shape). Raises: ValueError for a batch of another shape."""

    def check(self) -> None:  # noqa: B027  nothing to check is usual
        """Raises: ValueError if arrays do not have their shapes, saying what was expected."""

    def rounding_error(self, x) -> Any:
        """Bound, (b,), on the l2 distance between the computed and the exact output at the stored float64 x.

        Raises: NotCertifiable where none is known.
        """
        raise NotCertifiable(f"no bound of the rounding error is known for an operator of type {type(self).__name__}.")

    @classmethod
    def rebuild(cls, **fields) -> Any:
        """The operator that stores these fields, unchanged: what loading a saved network calls."""
        return cls(**fields)

    def _arrays_text(self) -> str:
        """The sizes of arrays as `repr` states them, such as "3x3, 16 -> 32"; reads shapes alone, through `sizes`."""
        return ""

    def __repr__(self) -> str:
        """Type, sizes and what is not a default, on one line: Conv(3x3, 16 -> 16, in (32, 32, 16)).

        No array is read: leaves may be tracers, None, or anything that a tree transformation puts in their place.
        """
        texts = [self._arrays_text()] if self._arrays_text() else []
        fields = {field.name: field for field in dataclasses.fields(self)} if dataclasses.is_dataclass(self) else {}
        for name in getattr(self, "_static", ()):
            value = getattr(self, name, None)
            if name != "in_shape" and value != fields[name].default:
                texts.append(name if value is True else f"{name} {value}")
        if "in_shape" in fields:
            shape = getattr(self, "in_shape", "?")
            texts.append(f"in {shape}")
        return f"{type(self).__name__}({', '.join(texts)})"


def operator_class(op: Operator) -> type:
    """The class that `operator` made which an operator is of, or of a subclass of."""
    return next(cls for cls in (*type(op).__mro__, type(op)) if "_static" in vars(cls) or cls is Operator)


def _check_fields(op, arrays: tuple[str, ...], static: tuple[str, ...]) -> None:
    """The checks of all constructors: arrays are arrays, in_shape is a tuple of sizes (lists become one).

    Raises: ValueError naming class and field.
    """
    kind = type(op).__name__
    for name in arrays:
        value = getattr(op, name)
        plain = isinstance(value, numbers.Number) and not hasattr(value, "shape")
        if plain or isinstance(value, list) and not any(isinstance(part, Operator) for part in value):
            raise ValueError(
                f"{kind} expects {name} to be a NumPy or JAX array, got a {type(value).__name__}: np.asarray makes one."
            )
    if "in_shape" in static:
        shape = op.in_shape
        if not isinstance(shape, (tuple, list)) or not shape or not all(_is_size(n) for n in shape):
            raise ValueError(f"{kind} expects an in_shape of sizes >= 1, such as (h, w, c) or (n,), got {shape!r}.")
        object.__setattr__(op, "in_shape", tuple(int(n) for n in shape))


def _is_size(n) -> bool:
    return isinstance(n, numbers.Integral) and not isinstance(n, bool) and int(n) >= 1


@dataclass_transform(frozen_default=True)
def operator(*arrays: str, static: tuple[str, ...], later: tuple[str, ...] = ()):
    """Class decorator: a frozen dataclass that is a pytree of `arrays` with `static` metadata.

    later: those of `static` that saved networks leave out where they have their defaults: fields that a class has got
    since networks with it were saved, whose files and hashes stay what they were.
    Its constructor checks types, shapes and numbers, through `check` where the class has one. Tree transformations do
    not call it: they may put anything in the place of arrays.
    """

    def wrap(cls):
        own = getattr(cls, "__post_init__", lambda op: None)

        def __post_init__(op):
            _check_fields(op, arrays, static)
            own(op)
            if isinstance(op, Operator):
                op.check()

        cls.__post_init__ = __post_init__
        cls._static, cls._later = static, later
        cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        keys = [jax.tree_util.GetAttrKey(name) for name in arrays]

        def flatten(op):
            return [getattr(op, name) for name in arrays], tuple(getattr(op, name) for name in static)

        def flatten_with_keys(op):
            leaves, metadata = flatten(op)
            return list(zip(keys, leaves, strict=True)), metadata

        def unflatten(metadata, leaves):
            op = object.__new__(cls)  # not the constructor: leaves may be anything
            for name, value in (*zip(static, metadata, strict=True), *zip(arrays, leaves, strict=True)):
                object.__setattr__(op, name, value)
            return op

        # Not `register_dataclass`: structures of two classes registered with it compare equal if their fields do (JAX
        # 0.10.2), and when their hashes happen to collide, jit runs the program compiled for the other class.
        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return cls

    return wrap


def norm_per_image(x: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """l2 norm of every image of a batch, in the unit of x."""
    return jnp.linalg.norm(x.reshape(x.shape[0], -1), axis=1)


def check_input(operator, x) -> None:
    """Raises: ValueError unless x is a batch of `operator.in_shape`."""
    if x.shape[1:] != tuple(operator.in_shape):
        shape = ", ".join(map(str, operator.in_shape))
        raise ValueError(f"{type(operator).__name__} expects a batch (b, {shape}), got {x.shape}.")


class Linear(Operator, Estimated):
    """A linear map. Its norm is estimated by power iteration on A^T A, through `_map` and `_adjoint`.

    Subclasses define both for a given `jax.lax.Precision` of products.
    """

    @abc.abstractmethod
    def _map(self, x, precision) -> Any: ...

    @abc.abstractmethod
    def _adjoint(self, y, precision) -> Any: ...

    def estimate(self, v, num_iters: int):
        """Differentiable estimate of the norm, never above it before rounding.

        Args: v: (*in_shape), start vector. num_iters: steps of power iteration.
        Returns: (sigma, v): sigma = |A v| for the v reached, a constant under differentiation.
        """
        sigma, v = spectral.power_iteration(*self._exactly(), v, num_iters)
        return sigma, v

    def converge(self, v):
        """`estimate` where it has converged (`spectral.largest_vector`): for norms outside of training steps."""
        constant = jax.lax.stop_gradient(self)
        return self.estimate(spectral.largest_vector(*constant._exactly(), v), 0)

    def _exactly(self):
        """The map and its adjoint, of one vector each."""
        highest = jax.lax.Precision.HIGHEST
        return lambda u: self._map(u[None], highest)[0], lambda u: self._adjoint(u[None], highest)[0]

    def __call__(self, x):
        check_input(self, x)
        return self._map(x, None)

    def adjoint(self, y):
        """A^T y for a batch (b, *out_shape): (b, *in_shape)."""
        return self._adjoint(y, None)

    def row_sum_bound(self) -> spectral.NormBound | None:
        """A cheap bound of the norm, `spectral.row_sum_bound`, for who needs it to be at most 1; None without one."""
        return None


class Factor(Linear, Bounded):
    """A linear map that a composite applies forward and back, or of which it applies some columns forward, some back.

    Both methods give operators that store the very same numbers, but for a power of two.
    """

    @abc.abstractmethod
    def transpose(self, factor: float) -> "Linear":
        """The adjoint times a power of two, or minus one, as an operator: its entries are exact."""

    @abc.abstractmethod
    def channels(self, start: int, stop: int | None) -> "Factor":
        """The map on inputs whose last axis holds the channels from `start` to `stop` alone: as many columns."""


class Isometric(Operator, Bounded):
    """An operator that is 1-Lipschitz by construction; without rounding error unless it says otherwise."""

    _reason = ""

    @property
    def out_shape(self):
        return self.in_shape

    def bound(self) -> spectral.NormBound:
        return spectral.NormBound(1.0, self._reason, {})

    def rounding_error(self, x):
        return jnp.zeros(x.shape[0], x.dtype)


class Reordering(Isometric):
    """A linear map that moves numbers, appends zeros or leaves numbers out: exact, of norm 1.

    Subclasses define `_move` and `_move_back`, its adjoint, for NumPy arrays, which stay such, and JAX arrays.

    Attributes:
      window: (stride, low, size) where row p of the output holds numbers of the rows stride p - low + (0, ..., size -
        1) of the input alone; None where rows mix.
    """

    @abc.abstractmethod
    def _move(self, x) -> Any: ...

    @abc.abstractmethod
    def _move_back(self, y) -> Any: ...

    @property
    def window(self) -> tuple[int, int, int] | None:
        return None

    def __call__(self, x):
        check_input(self, x)
        return self._move(jnp.asarray(x))

    def adjoint(self, y):
        """A^T y for a batch (b, *out_shape): (b, *in_shape)."""
        return self._move_back(jnp.asarray(y))

    def host_maps(self):
        """(x -> A x, y -> A^T y) for batches of NumPy arrays."""
        return self._move, self._move_back


class Elementwise(Operator, Bounded):
    """An activation that acts on every component alone, which loop transformation (LipLT) composes with linear maps."""

    homogeneous = False  # True if f(c x) = c f(x) for all c > 0, so that positive scales may pass through it

    @property
    @abc.abstractmethod
    def slope(self) -> Any:
        """The least (alpha, beta) with alpha (s - t) <= f(s) - f(t) <= beta (s - t) for all real s >= t: no default."""

    @property
    def out_shape(self):
        return self.in_shape

    def bound(self) -> spectral.NormBound:
        low, high = self.slope
        return spectral.NormBound(max(abs(low), abs(high)), f"exact: slopes between {low:g} and {high:g}", {})


class Composite(Operator, Bounded):
    """An operator made of others: x -> g(x), or x + g(x) if `adds_input`, g its parts in turn.

    Every walk over a network (evaluation with error bounds, float32, estimates, attacks) enters it through this class:
    it applies the parts one by one, each compiled alone where rounding errors are bounded, and adds the input. So the
    map is defined by `parts` and `adds_input`, and a subclass may not define `__call__` or `rounding_error`. Errors of
    the input pass through it by its own constant, which may be less than what the parts' constants say.

    Attributes:
      adds_input: whether the input is added to what the parts make of it.
      taken_apart: whether loop transformation (LipLT) may look at the parts; else it refuses the composite by name.
    """

    adds_input = False
    taken_apart = True
    _reason = "the product of the operators' bounds"

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        for name in ("__call__", "rounding_error"):  # also of a class that stands before Composite among the bases
            if getattr(cls, name) is not getattr(Composite, name):
                raise TypeError(f"{cls.__name__} defines {name}, but parts() and adds_input define a Composite.")

    def check(self) -> None:
        self.check_parts()

    def check_parts(self) -> None:
        """Raises: ValueError unless each part takes just what the one before it gives. Networks call it, too."""
        kind, parts = type(self).__name__, self.parts()
        if not isinstance(parts, tuple) or not parts:
            raise ValueError(f"expected a tuple of at least one operator as parts of the {kind}, got {parts!r}.")
        for i, op in enumerate(parts):
            if not isinstance(op, Operator) or isinstance(op, Composite):
                raise ValueError(f"operator {i}: {type(op).__name__} cannot stand inside a {kind}.")
            op.check()
        shapes = [(op.in_shape, op.out_shape) for op in parts]
        check_chain(kind, self.in_shape, self.out_shape, shapes, self.adds_input)

    @abc.abstractmethod
    def parts(self) -> tuple:
        """The operators, in the order in which they are applied; none of them a Composite."""

    @abc.abstractmethod
    def with_parts(self, parts: tuple) -> Any:
        """The same with other parts, unchecked: walks put in what takes a part's place."""

    def measured(self) -> tuple:
        """The operators whose norms the constant is made of: the parts, or what they are made of."""
        return self.parts()

    def with_measured(self, ops: tuple) -> Any:
        """The same with others in the place of `measured`, unchecked: of such a one norms are estimated, no more."""
        return self.with_parts(ops)

    @abc.abstractmethod
    def lipschitz_of(self, product: Any) -> Any:
        """A Lipschitz constant, given the product of those of `measured`: likewise a number, Fraction or JAX scalar."""

    def __call__(self, x):
        check_input(self, x)
        y = x
        for part in self.parts():
            y = part(y)
        return x + y if self.adds_input else y

    def bound(self) -> spectral.NormBound:
        """`lipschitz_of` the parts' bounds, which are in details["parts"] for error bounds to pass through them."""
        self.check_parts()
        parts = [bound_row(f"operator {i}", op) for i, op in enumerate(self.parts())]
        # Of the claims, so that the checker's proofs of them carry over.
        product = math.prod((Fraction(part["bound"]) for part in parts), start=Fraction(1))
        return spectral.NormBound(float_up(self.lipschitz_of(product)), self._reason, {"parts": parts})


class Head(Operator):
    """The last operator, from features to logits."""

    @abc.abstractmethod
    def pairwise_lipschitz(self) -> Any:
        """Estimates, (k, k), of the Lipschitz constants of all differences of logits: for training."""

    @abc.abstractmethod
    def pairwise_bound(self) -> Any:
        """Proved upper bounds of them: (k, k) NumPy float64. Raises: NotCertifiable if arrays admit none."""
