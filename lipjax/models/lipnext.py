"""LipNeXt-style networks. No code of the original is public: docs/lipnext.md says what is known and what is ours."""

import functools
from fractions import Fraction

from lipjax import operators
from lipjax.nn import CholeskyConv, CholeskyDense, Conv, LinearHead, LinearResidual, LipschitzModel, flatten
from lipjax.nn.tokens import ORTHOGONAL, POSITIONS, ShiftBlocks, l2_pool, patch_tokens
from lipjax.operators.tokens import DELTAS

NECKS = ("l2", "regions", "patches")
STEMS = ("patches", "conv")
ACTIVATIONS = ("abs", "maxmin")


class LipNeXt(LipschitzModel):
    """Square patches as tokens, `depth` blocks on `width` channels of every token, neck, head.

    tokens: rows of the grid of tokens; patches are square, so columns follow. stem "patches": the pixels of a patch as
    channels, and zeros up to width, an isometry; "conv": a convolution of (2 s + 1) x (2 s + 1) pixels with stride s,
    whose norm is free. Blocks: Z = activation(M R^T S(R (X + p)) + b), see `nn.ShiftBlocks`; `shift` is the part of
    the channels that S moves in each of four directions, activation "abs" the absolute value of the first `absolute`
    of the channels, or "maxmin". orthogonal: "cholesky" (contractive), "exponential", or "manifold", for an optimizer
    on the manifold. premix, identity_start, positions: of `nn.ShiftBlocks`. residual_blocks: so many linear residual
    convolutions of LiResNet with MaxMin come before the blocks (ours: a hybrid); their norms are free.

    Neck "l2": l2 pooling of the whole map. "regions": l2 pooling of regions x regions parts of it, then a contractive
    dense layer to neck_features. "patches": a contractive map of each of these parts to width numbers, then that dense
    layer. pool_delta: of `operators.L2Pool`. Head: rows of length 1 with head_normalize (LLN).

    But for the stem "conv" and residual blocks every layer is 1-Lipschitz, and most keep norms, so logits have no
    scale of their own: set logit_scale.

    Source: Hu, Hu & Fredrikson 2026, arXiv:2601.18513.
    """

    tokens: int = 8
    width: int = 128
    depth: int = 8
    residual_blocks: int = 0
    shift: float = 1 / 16
    activation: str = "abs"
    absolute: float = 0.5
    orthogonal: str = "cholesky"
    premix: bool = True
    identity_start: bool = True
    positions: str = "block"
    stem: str = "patches"
    neck: str = "regions"
    regions: int = 4
    neck_features: int = 256
    pool_delta: float = 1e-6
    head_normalize: bool = True

    def check(self) -> None:
        """Raises: ValueError if an attribute has no such value, or the sizes do not fit each other or the images."""
        self.check_choices(
            activation=ACTIVATIONS, orthogonal=tuple(ORTHOGONAL), positions=POSITIONS, stem=STEMS, neck=NECKS
        )
        if self.depth < 1:
            raise ValueError(f"expected depth >= 1, got {self.depth}.")
        if self.residual_blocks < 0 or (self.residual_blocks and self.width % 2):
            raise ValueError(
                f"expected residual_blocks >= 0, and an even width if there are any, got {self.residual_blocks} and "
                f"width {self.width}."
            )
        height, width, channels = self.input_shape
        if self.tokens < 1 or height % self.tokens or width % (height // self.tokens):
            raise ValueError(
                f"expected tokens to tile the image: a number of rows that divides the height of images "
                f"{height, width} into patches whose side divides the width, too, got {self.tokens}."
            )
        needed = channels * self._block**2
        if self.stem == "patches" and needed > self.width:
            raise ValueError(
                f"patches of {self._block} x {self._block} pixels have {needed} numbers, more than width {self.width}: "
                "take a larger width, more tokens, or stem='conv'."
            )
        moved = self.width * self.shift
        if moved < 0.5 or abs(moved - round(moved)) > 1e-9 * self.width or 4 * round(moved) > self.width:
            raise ValueError(
                f"expected shift to be a fraction of at most 1/4 that makes a whole number of the {self.width} "
                f"channels, at least 1, got {self.shift} ({moved:g} channels)."
            )
        if self.activation == "maxmin" and self.width % 2:
            raise ValueError(f"activation 'maxmin' pairs channels: expected an even width, got {self.width}.")
        part = Fraction(self.absolute) * self.width
        if self.activation == "abs" and not (0 < part <= self.width and part.denominator == 1):
            raise ValueError(
                f"expected absolute to be a fraction that makes a whole number of the {self.width} channels, at least "
                f"1, got {self.absolute}."
            )
        rows, columns = self._grid
        if self.neck != "l2" and (self.regions < 1 or rows % self.regions or columns % self.regions):
            raise ValueError(f"expected regions to divide the grid of {rows} x {columns} tokens, got {self.regions}.")
        if self.neck != "l2" and (self.neck_features < 2 or self.neck_features % 2):
            raise ValueError(f"expected an even neck_features, got {self.neck_features}.")
        if self.neck == "patches" and rows != columns:
            raise ValueError(f"neck 'patches' takes a square map, not one of {rows} x {columns} tokens.")
        if not DELTAS[0] <= self.pool_delta <= DELTAS[1]:
            raise ValueError(f"expected a pool_delta between 2^-64 and 2^64, got {self.pool_delta}.")

    @property
    def _block(self) -> int:
        """The side of a patch."""
        return self.input_shape[0] // self.tokens

    @property
    def _grid(self) -> tuple[int, int]:
        return self.tokens, self.input_shape[1] // self._block

    def layers(self):
        block = self._block
        if self.stem == "patches":
            stem = functools.partial(patch_tokens, block=block, channels=self.width)
        else:
            pads = ((block, block), (block, block))
            stem = Conv(self.width, 2 * block + 1, block, pads, activation=None, name="stem")
        convolutions = [
            LinearResidual(self.residual_blocks, name=f"residual_{i:02d}") for i in range(1, self.residual_blocks + 1)
        ]
        if self.activation == "abs":
            activation = functools.partial(operators.PartialAbs, fraction=self.absolute)
        else:
            activation = operators.MaxMin
        blocks = ShiftBlocks(
            self.depth,
            round(self.width * self.shift),
            self.orthogonal,
            self.premix,
            self.identity_start,
            self.positions,
            activation,
            name="block",
        )
        if self.neck == "patches":
            neck = [CholeskyConv(self.width, self.tokens // self.regions, name="neck_conv"), flatten]
        else:
            regions = (1, 1) if self.neck == "l2" else (self.regions, self.regions)
            neck = [functools.partial(l2_pool, regions=regions, delta=self.pool_delta), flatten]
        if self.neck != "l2":
            neck.append(CholeskyDense(self.neck_features, name="neck_dense"))
        return [stem, *convolutions, blocks, *neck], LinearHead(self.num_classes, self.head_normalize, name="head")
