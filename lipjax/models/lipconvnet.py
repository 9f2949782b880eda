"""LipConvnet-5, -10, ..., -40 of the two papers on skew orthogonal convolutions."""

from lipjax.nn import (
    ACTIVATIONS,
    POOLINGS,
    SOC,
    Cayley,
    CayleyHead,
    LinearHead,
    LipschitzModel,
    MLPHead,
    SOCHead,
    flatten,
)
from lipjax.parametrize.soc_forms import FORMS


class LipConvnet(LipschitzModel):
    """Five blocks of n = depth / 5 orthogonal convolutions; each block halves the map and doubles the width.

    variant "plain" (ICLR 2022): the first n - 1 convolutions of a block are 3x3 with stride 1, the last one has stride
    2 (and a 1x1 kernel in the last block) and doubles the channels, of which there are `width` in the first block.
    variant "pooled" (NeurIPS 2022): a 3x3 stem to `width` channels; strided convolutions keep all 4 c channels of the
    reordered map and `pooling` of pairs halves them; the kernels of the last block are 1x1, the strided one first.
    Images of 32 x 32 leave five blocks as vectors; num_blocks fits other sizes, which must be multiples of its power
    of two.

    layer: "soc" or "cayley". activation: "maxmin", "householder", "householder2". pooling: "max", "projection".
    head: "lln" (rows of length 1), "orthonormal", "linear" (free rows) or "mlp" (head_features hidden units; the pooled
    variant then does not pool its last features). The other attributes are those of `nn.SOC`; scale None normalises
    nothing, and a 1x1 kernel, whose norm is exact, is normalised to 1.

    Source: Singla, Singla & Feizi 2022, arXiv:2108.04062; Singla & Feizi 2022, arXiv:2211.08453.
    """

    depth: int = 5
    num_blocks: int = 5
    width: int = 32
    variant: str = "plain"
    layer: str = "soc"
    activation: str = "maxmin"
    pooling: str = "max"
    head: str = "lln"
    head_features: int = 4096
    padding: str = "ZERO"
    train_terms: int | None = 5
    eval_terms: int | None = 12
    scale: float | None = 0.7
    form: str = "auto"
    fast_gradient: bool = False

    def check(self) -> None:
        """Raises: ValueError if an attribute has no such value, or the sizes do not fit each other."""
        for name, known in (
            ("variant", ("plain", "pooled")),
            ("layer", ("soc", "cayley")),
            ("activation", tuple(ACTIVATIONS)),
            ("pooling", tuple(POOLINGS)),
            ("form", FORMS),
            ("head", ("lln", "orthonormal", "linear", "mlp")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"expected {name} to be one of {known}, got {getattr(self, name)!r}.")
        if self.num_blocks < 1 or self.depth < self.num_blocks or self.depth % self.num_blocks:
            raise ValueError(f"expected depth to be a multiple of num_blocks {self.num_blocks}, got {self.depth}.")
        if self.width < 2 or self.width % 2:
            raise ValueError(f"expected an even width, got {self.width}.")
        shrink = 2**self.num_blocks
        if self.input_shape[0] % shrink or self.input_shape[1] % shrink:
            raise ValueError(
                f"{self.num_blocks} blocks need images whose sides are multiples of {shrink}, got "
                f"{self.input_shape[:2]}: set num_blocks to fit."
            )
        for name in ("train_terms", "eval_terms"):
            terms = getattr(self, name)
            if terms is not None and terms < 1:
                raise ValueError(f"expected {name} >= 1 or None, got {terms}.")
            if terms is None and self.padding == "ZERO" and self.layer == "soc":
                raise ValueError(f"{name} None, the exact exponential, needs padding 'CIRCULAR'.")
        if self.padding not in ("ZERO", "CIRCULAR"):
            raise ValueError(f"expected padding 'ZERO' or 'CIRCULAR', got {self.padding!r}.")
        if self.padding == "ZERO" and self.layer == "soc" and self.form in ("response", "series"):
            raise ValueError(f"form {self.form!r} works in the frequency domain, which needs padding 'CIRCULAR'.")
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"expected scale > 0 or None, got {self.scale}.")

    def _soc_options(self) -> dict:
        return {"train_terms": self.train_terms, "eval_terms": self.eval_terms}

    def _conv(self, name: str, features: int, kernel_size: int, strides: int, activation):
        if self.layer == "cayley":
            return Cayley(features, kernel_size, strides, activation=activation, name=name)
        return SOC(
            features,
            kernel_size,
            strides,
            padding=self.padding,
            scale=self._scale(kernel_size),
            form=self.form,
            fast_gradient=self.fast_gradient,
            batch_size=self.batch_size,
            activation=activation,
            name=name,
            **self._soc_options(),
        )

    def _scale(self, kernel_size: int) -> float | None:
        return 1.0 if self.scale is not None and kernel_size == 1 else self.scale

    def _plain(self) -> list:
        activation, per_block = ACTIVATIONS[self.activation], self.depth // self.num_blocks
        layers, width = [], self.width
        for block in range(1, self.num_blocks + 1):
            for i in range(per_block - 1):
                layers.append(self._conv(f"block{block}_conv{i}", width, 3, 1, activation))
            kernel_size, width = (1 if block == self.num_blocks else 3), 2 * width
            layers.append(self._conv(f"block{block}_conv{per_block - 1}", width, kernel_size, 2, activation))
        return layers

    def _pooled(self) -> list:
        activation, pooling = ACTIVATIONS[self.activation], POOLINGS[self.pooling]
        per_block, width = self.depth // self.num_blocks, self.width
        layers = [self._conv("stem", width, 3, 1, activation)]
        for block in range(1, self.num_blocks):
            for i in range(per_block - 1):
                layers.append(self._conv(f"block{block}_conv{i}", width, 3, 1, activation))
            layers.append(self._conv(f"block{block}_conv{per_block - 1}", 4 * width, 3, 2, pooling))
            width *= 2
        last = activation if self.head == "mlp" else pooling
        for i in range(per_block):
            after = last if i == per_block - 1 else activation
            layers.append(self._conv(f"block{self.num_blocks}_conv{i}", 4 * width, 1, 1 if i else 2, after))
        return layers

    def layers(self):
        layers = self._pooled() if self.variant == "pooled" else self._plain()
        if self.head == "mlp":
            head = MLPHead(self.num_classes, self.head_features, name="head")
        elif self.head != "orthonormal":
            head = LinearHead(self.num_classes, self.head == "lln", name="head")
        elif self.layer == "cayley":
            head = CayleyHead(self.num_classes, name="head")
        else:
            head = SOCHead(self.num_classes, scale=self._scale(1), **self._soc_options(), name="head")
        return [*layers, flatten], head
