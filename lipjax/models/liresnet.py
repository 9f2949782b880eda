"""LiResNet, as published at NeurIPS 2023 and with what the recipe of ICLR 2024 adds."""

import functools
from typing import Any

from lipjax import conv
from lipjax.nn import (
    CholeskyConv,
    CholeskyDense,
    CholeskyStack,
    Conv,
    ConventionalResidual,
    Dense,
    LinearHead,
    LinearResidual,
    LipschitzModel,
    flatten,
)

NECKS = ("free", "cholesky")
BLOCKS = ("linear", "conventional")


class LiResNet(LipschitzModel):
    """Stem, `depth` linear residual convolutions, neck, head; MaxMin after every layer but the head.

    Stem: stem_kernel x stem_kernel convolution to `width` channels with stride stem_strides, zero padding stem_padding.
    Neck: 4x4 convolution with stride 4, width -> width, then a dense layer to neck_features (4 width if None). Head:
    rows of length 1 with head_normalize (LLN). Norms of all are unconstrained, estimated in training and proved at
    certification.

    block "conventional" puts what the paper compares with in the place of the linear residual blocks: x +
    MaxMin(convolution), of the same sizes (`ConventionalResidual`).

    Of 2024, all off by default: neck "cholesky" (`Map2Vec` of the original) makes both maps of the neck contractive,
    without a bias or MaxMin between them; dense_depth contractive residual dense layers follow the neck; centering
    subtracts means from what each block adds; small_init starts the blocks nearer to the identity (`LinearResidual`).

    Source: Hu et al. 2023, arXiv:2301.12549; 2024: Hu et al. 2024, arXiv:2310.02513, of which the scale L^(-1/2) gamma
    of the blocks is always there.
    """

    depth: int = 12
    width: int = 512
    stem_kernel: int = 5
    stem_strides: int = 2
    stem_padding: int = 2
    neck_features: int | None = None
    head_normalize: bool = True
    neck: str = "free"
    dense_depth: int = 0
    centering: bool = False
    small_init: bool = False
    block: str = "linear"

    def _stem_pads(self):
        return (self.stem_padding, self.stem_padding), (self.stem_padding, self.stem_padding)

    def check(self) -> None:
        """Raises: ValueError if the sizes do not fit each other."""
        if self.depth < 1 or self.width < 2 or self.width % 2:
            raise ValueError(f"expected depth >= 1 and an even width, got depth {self.depth} and width {self.width}.")
        if self.stem_kernel < 1 or self.stem_strides < 1 or self.stem_padding < 0:
            raise ValueError("expected stem_kernel and stem_strides >= 1 and stem_padding >= 0.")
        if self.neck_features is not None and (self.neck_features < 2 or self.neck_features % 2):
            raise ValueError(f"expected an even neck_features, got {self.neck_features}.")
        self.check_choices(neck=NECKS, block=BLOCKS)
        if self.block != "linear" and self.centering:
            raise ValueError(f"centering subtracts means from linear blocks: set block='linear', not {self.block!r}.")
        if self.dense_depth < 0:
            raise ValueError(f"expected dense_depth >= 0, got {self.dense_depth}.")
        kernel = (self.stem_kernel, self.stem_kernel)
        stem = conv.output_size(self.input_shape[:2], kernel, self.stem_strides, self._stem_pads())
        if min(stem) < 4:
            raise ValueError(f"the stem leaves maps of {stem}, and the neck needs at least 4 x 4: lower stem_strides.")

    def layers(self):
        layers: list = [Conv(self.width, self.stem_kernel, self.stem_strides, self._stem_pads(), name="stem")]
        if self.block == "linear":
            block: Any = functools.partial(LinearResidual, centering=self.centering)
        else:
            block = ConventionalResidual
        block = functools.partial(block, self.depth, small_init=self.small_init)
        layers += [block(name=f"block_{i:02d}") for i in range(1, self.depth + 1)]
        features = self.neck_features or 4 * self.width
        if self.neck == "cholesky":
            layers += [CholeskyConv(self.width, 4, name="neck_conv"), flatten]
            layers += [CholeskyDense(features, name="neck_dense")]
        else:
            layers += [Conv(self.width, 4, 4, "VALID", name="neck_conv"), flatten]
            layers += [Dense(features, name="neck_dense")]
        if self.dense_depth:
            layers.append(CholeskyStack(self.dense_depth, name="dense"))
        return layers, LinearHead(self.num_classes, self.head_normalize, name="head")
