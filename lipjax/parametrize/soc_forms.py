"""The operators of a SOC layer: one function, computed in the form that suits the shapes."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lipjax import _spread, linalg, operators
from lipjax.parametrize import soc_frequency
from lipjax.spectral import series

FORMS = ("auto", "spatial", "response", "series")
# A series whose gain stays below this counts as nonexpansive in training estimates (5 terms of norm 3: 1.0047).
_GAIN = 1.01


def operators_of(
    kernel: Float[Array, "kh kw i m"],
    in_shape: tuple[int, ...],
    features: int,
    *,
    num_terms: int | None,
    padding: str = "ZERO",
    promised_norm: float | None = None,
    form: str = "auto",
    train: bool = False,
    batch_size: int = 128,
    fast_gradient: bool = False,
    other_terms: int | None = 0,
    groups: int = 1,
) -> list:
    """Operators that apply S_p(A), or exp(A), to images whose channels are padded to m, and keep `features` of them.

    The arguments up to padding say what is computed; form, train and batch_size only how:
      "spatial": p convolutions in turn (`ConvExponential`).
      "response": the matrix function per frequency, once, then one product per frequency (`CircularConv`; of kernels of
        one tap `Conv`).
      "series": the series acts on the images' spectrum, and no matrix function is formed (`CircularSeries`).
    "auto" takes for a training step what `soc_frequency.choose_form` expects to be fastest. Otherwise, where padding is
    circular, "auto", "series" (which holds nothing that can be certified) and an exact exponential take the response.
    Of kernels of one tap "auto" takes the response with any padding: one matrix, and a convolution with it (`Conv`).

    Args:
      kernel: HWIO (kh, kw, m / groups, m), skew, m = max(in_shape[-1], features).
      num_terms: the highest power p of the series; None for the exponential itself, which needs circular padding.
      promised_norm: a number that the norm of A does not exceed in training (a promise made of a scale found by power
        iteration, not a proof), or None if nothing is known. Forms without
        a matrix function then compute exp(A) by as many terms as reach 1e-6.
      other_terms: num_terms where the layer is built otherwise (in training, or out of it); 0: nowhere. Only what is
        nonexpansive by both promises to be, so that the same norms are estimated everywhere.
      groups: of channels, each with a kernel of its own; they have only the form "spatial".
    Returns: operators in order, from in_shape to (h, w, features).
    Raises: ValueError for channels that do not fit, an unknown form, and a form that cannot compute the function.
    Source: Singla & Feizi 2021, arXiv:2105.11417; Singla, Singla & Feizi 2022, arXiv:2108.04062.
    """
    h, w, c = in_shape
    m = kernel.shape[-1]
    if m != max(c, features):
        raise ValueError(f"Expected a kernel of {max(c, features)} channels, got shape {kernel.shape}.")
    if form not in FORMS:
        raise ValueError(f"Expected form to be one of {FORMS}, got {form!r}.")
    if padding not in ("ZERO", "CIRCULAR"):
        raise ValueError(f"Expected padding 'ZERO' or 'CIRCULAR', got {padding!r}.")
    if padding == "ZERO" and (num_terms is None or form in ("response", "series")):
        raise ValueError(
            "Zero padding has only the form 'spatial' with a number of terms, "
            f"got form {form!r} and num_terms {num_terms}: take padding 'CIRCULAR' for the others."
        )
    if groups > 1 and (num_terms is None or form in ("response", "series")):
        raise ValueError(
            "Groups have only the form 'spatial' with a number of terms, "
            f"got {groups} groups, form {form!r} and num_terms {num_terms}."
        )
    terms = num_terms
    if num_terms is None and promised_norm is not None:
        terms = series.terms_for(promised_norm, 1e-6)
    one_tap = kernel.shape[:2] == (1, 1) and groups == 1
    if one_tap and form == "auto" and not fast_gradient:
        form = "response"  # a matrix, with any padding
    elif padding == "ZERO" or groups > 1:
        form = "spatial"
    elif form == "auto" and train:
        num_devices = _spread.num_devices()
        form = soc_frequency.choose_form(
            (h, w),
            m,
            c,
            features,
            (kernel.shape[0], kernel.shape[1]),
            batch_size * num_devices,
            num_terms=num_terms,
            promised_norm=promised_norm,
            num_devices=num_devices,
        )
    elif form == "auto" or (not train and (form == "series" or num_terms is None)):
        form = "response"
    everywhere = {num_terms} if other_terms == 0 else {num_terms, other_terms}
    nonexpansive = all(_is_nonexpansive(number, promised_norm) for number in everywhere)
    if form == "response":

        def blocks(size):
            fixed, paired = soc_frequency.exponential_blocks(kernel, size, num_terms, out_channels=features)
            return fixed[..., :c], paired[..., :c]

        return [
            operators.conv_of_blocks(blocks, max(kernel.shape[:2]), in_shape, nonexpansive=nonexpansive, train=train)
        ]
    if terms is None:
        raise ValueError(
            f"Form {form!r} computes exp(A) as a series, which needs a bound on the norm of A: normalise the kernel."
        )
    if form == "series":
        fixed, paired = soc_frequency.packed_response(kernel, (h, w), divided=False)
        return [operators.CircularSeries(fixed, paired, tuple(in_shape), features, terms, nonexpansive=nonexpansive)]
    ops: list = [] if c == m else [operators.PadChannels(tuple(in_shape), m)]
    ops.append(operators.ConvExponential(kernel, (h, w, m), terms, padding, nonexpansive, fast_gradient, groups))
    return ops if features == m else [*ops, operators.CropChannels((h, w, m), features)]


def _is_nonexpansive(num_terms: int | None, promised_norm: float | None) -> bool:
    """True if exp(A), or its series, counts as such in training estimates, |A| <= promised_norm (None: unknown)."""
    return num_terms is None or (promised_norm is not None and series.gain_bound(num_terms, promised_norm) <= _GAIN)


def orthonormal_rows(skew: Float[Array, "n n"], num_rows: int, num_terms: int | None) -> Float[Array, "k n"]:
    """The first rows of exp(A), or of its series S_p(A), for a skew matrix A.

    Args: num_terms: p; None for the exponential. Returns: (num_rows, n); orthonormal if exact.
    """
    if num_terms is None:
        return linalg.expm_skew(skew)[:num_rows]
    term = total = jnp.eye(num_rows, skew.shape[0], dtype=skew.dtype)
    for power in range(1, num_terms + 1):
        term = jnp.matmul(term, skew, precision="highest") / power
        total = total + term
    return total
