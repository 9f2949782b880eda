"""Networks that were read, held against what computes them elsewhere: a wrong order of channels must not pass."""

from collections.abc import Callable

import numpy as np

from lipjax.certify import freeze
from lipjax.errors import UserError
from lipjax.interop.assembly import Assembly
from lipjax.network import Network

# Of the spread of logits over images, and of the logits themselves: what float32 may differ by. A wrong order of
# channels changes logits by about their spread.
_OF_SPREAD, _OF_SIZE = 2.0**-7, 2.0**-18
_IMAGES = 4


def compare_logits(
    network: Network, input_shape, normalisation: tuple, run: Callable[[np.ndarray], np.ndarray], where: str
) -> None:
    """Compares logits at random images.

    Args: input_shape: there, (c, h, w) or (n,). normalisation: mean and standard deviation, by channel, of what `run`
      takes: float32 (b, *input_shape) -> logits (b, k). where: what `run` runs, for the message.
    Raises: UserError if they differ by more than rounding in float32 explains.
    """
    pixels = np.random.default_rng(0).uniform(0, 1, (_IMAGES, *input_shape)).astype(np.float32)
    mean, std = (np.reshape(a, (-1, *[1] * (len(input_shape) - 1))) for a in normalisation)
    theirs = run(((pixels - mean) / std).astype(np.float32))
    ours = freeze(network)(np.moveaxis(pixels, 1, -1) if len(input_shape) == 3 else pixels)
    _compare(ours, theirs, "logits of the network that was read", where)


def compare_part(assembly: Assembly, input_shape, run: Callable[[np.ndarray], np.ndarray], where: str) -> None:
    """Compares what layers amid a network give for random numbers of both signs.

    Args: assembly: of these layers alone. input_shape, run, where: as of `compare_logits`, run's outputs of any shape.
    Raises: as `compare_logits`.
    """
    x = np.random.default_rng(0).uniform(-2, 2, (_IMAGES, *input_shape)).astype(np.float32)
    _compare(assembly.apply(x.astype(np.float64)), run(x), "numbers that layers give here", where)


def _compare(ours: np.ndarray, theirs, what: str, where: str) -> None:
    theirs = np.asarray(theirs, np.float64)
    if theirs.shape != ours.shape:
        raise UserError(f"Expected outputs {ours.shape} of {where}, got {theirs.shape}: another network runs.")
    allowed = _OF_SPREAD * np.std(theirs, axis=0).max() + _OF_SIZE * np.abs(theirs).max()
    difference = np.abs(ours - theirs).max()
    if not difference <= allowed:
        raise UserError(
            f"The {what} and those of {where} differ by up to {difference:.3g} at random images, where rounding "
            f"explains {allowed:.3g}: a layer computes something else than it says, such as other pairs of channels. "
            "(compare=False leaves this check out.)"
        )
