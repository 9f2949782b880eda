"""Group-and-shuffle convolutions: orthogonal layers in groups, with the channels dealt out anew between them."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from lipjax import operators
from lipjax.nn.layers import NamedOperators
from lipjax.nn.orthogonal import SOC


class GroupAndShuffle(nn.Module):
    """Shuffle, SOC in groups, shuffle, 1 x 1 SOC in other groups, activation; a bias after each SOC.

    Each output depends on all inputs if the product of both numbers of groups is at most the number of channels, at a
    fraction of the cost of a SOC: 1 / groups for each term of the series, and a 1 x 1 layer in its groups.

    groups, pointwise_groups: of the first and the second layer. paired: neighbouring channels stay together when they
    are dealt out, which suits activations that act on neighbours. The first shuffle deals out the layer's own input,
    before strides (space to depth) and before channels are padded, and is left out where groups does not divide its
    channels; this is the order of the original. shuffle_between: False leaves the second one out, as the original's
    class GS_SOC does, which forgets its result; its GS_SOC_Accelerated has it. Other fields: as of `SOC`; scale is that
    of the first layer, the 1 x 1 layer's is 1.

    Source: Gorbunov, Yudin, Soboleva, Alanov, Naumov & Rakhuba 2024, arXiv:2406.10019.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    groups: int = 4
    pointwise_groups: int = 4
    paired: bool = False
    shuffle_between: bool = True
    padding: str = "ZERO"
    train_terms: int = 5
    eval_terms: int = 12
    scale: float | None = 0.7
    fast_gradient: bool = False
    normalization_iters: int = 1
    use_bias: bool = True
    activation: Callable | None = operators.MaxMin

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        first, second, shape = self.groups, self.pointwise_groups, tuple(in_shape)
        found: list[tuple[str, Any]] = []

        def shuffle(groups: int, name: str, shape: tuple[int, ...]) -> None:
            found.append((name, operators.ChannelShuffle(shape, groups, self.paired)))

        def layer(side: int, strides: int, groups: int, scale: float | None, name: str) -> None:
            soc = SOC(
                self.features,
                side,
                strides,
                padding=self.padding,
                train_terms=self.train_terms,
                eval_terms=self.eval_terms,
                scale=scale,
                fast_gradient=self.fast_gradient,
                normalization_iters=self.normalization_iters,
                use_bias=self.use_bias,
                activation=None,
                groups=groups,
                name=name,
            )
            found.extend(soc(found[-1][1].out_shape if found else shape, train))

        if first >= 1 and shape[-1] % ((2 if self.paired else 1) * first) == 0:
            shuffle(first, "shuffle", shape)
        layer(self.kernel_size, self.strides, first, self.scale, "spatial")
        if self.shuffle_between:
            shuffle(second, "shuffle_between", found[-1][1].out_shape)
        layer(1, 1, second, None if self.scale is None else 1.0, "pointwise")
        if self.activation is not None:
            found.append(("activation", self.activation(found[-1][1].out_shape)))
        name = self.name or type(self).__name__
        return [(f"{name}/{part}", op) for part, op in found]
