"""The convolution of a parametrisation by frequencies, without frequencies where the kernel has one tap."""

from collections.abc import Callable

from jaxtyping import Array

from lipjax.operators.base import Operator
from lipjax.operators.circular import CircularConv
from lipjax.operators.linear import Conv
from lipjax.operators.training_only import Contraction


def conv_of_blocks(
    blocks: Callable[[tuple[int, int]], tuple[Array, Array]],
    kernel_size: int,
    in_shape: tuple[int, ...],
    *,
    nonexpansive: bool = False,
    train: bool = False,
) -> Operator:
    """The convolution of a parametrisation by frequencies; of kernels of one tap an ordinary one, without frequencies.

    A kernel of one tap has the same block at each frequency, whatever the map, and so has a function of it: that block,
    on the channels of each pixel, is the convolution. It costs one matrix instead of one for each pair of frequencies,
    and no Fourier transform of the images.

    Args:
      blocks: (h, w) -> (fixed, paired), the parametrisation on maps of that size.
      kernel_size: sides of the kernel.
      in_shape: (h, w, c) of the images.
      nonexpansive: as of `CircularConv`. train: of a training step, which then counts 1 without an estimate.
    Returns: `Conv`, within `Contraction` in a training step of what is nonexpansive, for one tap; otherwise
      `CircularConv`. The norms of both are proved when they are certified.
    Raises: ValueError for blocks that do not fit in_shape.
    Error: none beyond that of the blocks. Source: ours; a constant response is that of a kernel of one tap.
    Example: one matrix instead of five, for the pairs of frequencies of 3 x 3 pixels.
      >>> kernel = jnp.ones((1, 1, 2, 4))
      >>> lipjax.operators.conv_of_blocks(lambda size: lipjax.conv.packed_response(kernel, size), 1, (3, 3, 2))
      Conv(1x1, 2 -> 4, in (3, 3, 2))
    """
    if kernel_size > 1:
        return CircularConv.from_blocks(*blocks((in_shape[0], in_shape[1])), tuple(in_shape), nonexpansive)
    op = Conv(blocks((1, 1))[0][0].T[None, None], tuple(in_shape))
    return Contraction(op) if train and nonexpansive else op
