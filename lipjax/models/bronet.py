"""BRONet: a LiResNet whose residual convolutions are replaced by block reflectors."""

import functools
from typing import Any

from lipjax import conv, operators
from lipjax.nn import (
    BRODense,
    BROPatches,
    BROResidual,
    BROStack,
    CholeskyConv,
    CholeskyDense,
    CholeskyStack,
    Conv,
    LinearHead,
    LinearResidual,
    LipschitzModel,
)
from lipjax.nn.layers import NamedOperators

NECKS = ("cholesky", "bro", "norm")
DENSE = ("cholesky", "bro")


class BRONet(LipschitzModel):
    """Stem, `depth` block reflector convolutions, neck, dense layers, head; MaxMin after every layer but neck and head.

    Stem: stem_kernel x stem_kernel convolution to `width` channels with stride stem_strides and zero padding
    stem_padding, of unconstrained norm. Then residual_depth blocks as LiResNet's (centred, with a small start), also
    unconstrained, and the reflectors (`nn.BROResidual`), of rank `rank` times the width. With crop=False, the second
    version of the paper's code, each of them leaves its map two pixels larger.

    Neck: patches of neck_patch x neck_patch pixels become one, by "cholesky" (contractive maps), "bro" (the first
    rows of a reflector) or "norm" (the length of each channel); then a dense layer to neck_features, and dense_depth
    more of them, by `dense`: "cholesky" or "bro", the latter of rank dense_rank times the width. Head: rows of length 1
    with head_normalize (LLN).

    Source: Lai et al. 2025, arXiv:2505.15174.
    """

    depth: int = 12
    width: int = 512
    rank: float = 0.5
    residual_depth: int = 0
    crop: bool = True
    stem_kernel: int = 5
    stem_strides: int = 2
    stem_padding: int = 2
    neck: str = "cholesky"
    neck_patch: int = 4
    neck_features: int = 2048
    dense: str = "cholesky"
    dense_depth: int = 8
    dense_rank: float = 0.5
    head_normalize: bool = True

    def _stem_pads(self):
        return (self.stem_padding, self.stem_padding), (self.stem_padding, self.stem_padding)

    def _map_size(self) -> tuple[int, ...]:
        """(h, w) of the maps that the neck gets."""
        kernel = (self.stem_kernel, self.stem_kernel)
        size = conv.output_size(self.input_shape[:2], kernel, self.stem_strides, self._stem_pads())
        return tuple(side if self.crop else side + 2 * self.depth for side in size)

    def check(self) -> None:
        """Raises: ValueError if the sizes do not fit each other."""
        self.check_choices(neck=NECKS, dense=DENSE)
        least = {"depth": 1, "residual_depth": 0, "stem_kernel": 1, "stem_strides": 1, "stem_padding": 0}
        for name, smallest in {**least, "neck_patch": 1, "dense_depth": 0}.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"expected {name} >= {smallest}, got {getattr(self, name)}.")
        for name in ("width", "neck_features"):
            if getattr(self, name) < 2 or getattr(self, name) % 2:
                raise ValueError(f"expected an even {name}, got {getattr(self, name)}.")
        h, w = self._map_size()
        if h != w or h < self.neck_patch or h % self.neck_patch:
            raise ValueError(f"the neck needs square maps that its patches of {self.neck_patch} divide, got {(h, w)}.")
        features = self.width * (h // self.neck_patch) ** 2
        if self.neck_features > features:
            raise ValueError(f"expected at most the {features} features of the map as neck_features.")

    def layers(self):
        layers: list = [Conv(self.width, self.stem_kernel, self.stem_strides, self._stem_pads(), name="stem")]
        block: Any = functools.partial(LinearResidual, self.residual_depth, centering=True, small_init=True)
        layers += [block(name=f"residual_{i:02d}") for i in range(1, self.residual_depth + 1)]
        block = functools.partial(BROResidual, self.depth, rank=self.rank, crop=self.crop)
        layers += [block(name=f"block_{i:02d}") for i in range(1, self.depth + 1)]
        if self.neck == "norm":
            layers.append(functools.partial(_lengths, self.neck_patch))
        else:
            patches = {"cholesky": CholeskyConv, "bro": BROPatches}[self.neck]
            layers.append(patches(self.width, self.neck_patch, name="neck_conv"))
        layers.append(_as_vectors)
        if self.dense == "cholesky":
            layers.append(CholeskyDense(self.neck_features, name="neck_dense"))
            stack: Any = CholeskyStack(self.dense_depth, name="dense")
        else:
            layers.append(BRODense(self.neck_features, constant_ridge=True, name="neck_dense"))
            stack = BROStack(self.dense_depth, rank=self.dense_rank, name="dense")
        if self.dense_depth:
            layers.append(stack)
        return layers, LinearHead(self.num_classes, self.head_normalize, name="head")


def _lengths(patch: int, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
    """Norms of patches, with nearly nothing under the root: the gradient is finite where a patch is 0."""
    h, w, _ = in_shape
    return [("neck_pool", operators.L2Pool(tuple(in_shape), (h // patch, w // patch), 2.0**-64))]


def _as_vectors(in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
    """Vectors of images, channel by channel, as the original has them: a cut reflector keeps the first of them."""
    together = operators.SpaceToDepth(tuple(in_shape), in_shape[0])
    return [("neck_order", together), ("flatten", operators.Flatten(together.out_shape))]
