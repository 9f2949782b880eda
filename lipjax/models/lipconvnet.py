"""LipConvnet-5, -10, ..., -40 of the two papers on skew orthogonal convolutions."""

from lipjax.nn import ALL_ACTIVATIONS, POOLINGS, LayeredModel, LinearHead, MLPHead, flatten


class LipConvnet(LayeredModel):
    """Five blocks of n = depth / 5 orthogonal convolutions; each block halves the map and doubles the width.

    variant "plain" (ICLR 2022): the first n - 1 convolutions of a block are 3x3 with stride 1, the last one has stride
    2 (and a 1x1 kernel in the last block) and doubles the channels, of which there are `width` in the first block.
    variant "pooled" (NeurIPS 2022): a 3x3 stem to `width` channels; strided convolutions keep all 4 c channels of the
    reordered map and `pooling` of pairs halves them; the kernels of the last block are 1x1, the strided one first.
    Images of 32 x 32 leave five blocks as vectors; num_blocks fits other sizes, which must be multiples of its power
    of two.

    layer: a name of `nn.LAYERS`, "soc" and "cayley" in the papers; layer_options: its fields. activation: a name of
    `nn.ALL_ACTIVATIONS`, of which the papers have "maxmin", "householder" and "householder2". pooling: "max",
    "projection". head: "lln" (rows of length 1), "orthonormal", "linear" (free rows) or "mlp" (head_features hidden
    units; the pooled variant then does not pool its last features).

    Source: Singla, Singla & Feizi 2022, arXiv:2108.04062; Singla & Feizi 2022, arXiv:2211.08453.
    """

    depth: int = 5
    num_blocks: int = 5
    width: int = 32
    variant: str = "plain"
    activation: str = "maxmin"
    pooling: str = "max"
    head: str = "lln"
    head_features: int = 4096

    def check(self) -> None:
        """Raises: ValueError if an attribute has no such value, or the sizes do not fit each other."""
        self.check_choices(
            variant=("plain", "pooled"),
            activation=tuple(ALL_ACTIVATIONS),
            pooling=tuple(POOLINGS),
            head=("lln", "orthonormal", "linear", "mlp"),
        )
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
        self.check_layer()

    def _plain(self) -> list:
        activation, per_block = ALL_ACTIVATIONS[self.activation], self.depth // self.num_blocks
        layers, width = [], self.width
        for block in range(1, self.num_blocks + 1):
            for i in range(per_block - 1):
                layers.append(self.conv(f"block{block}_conv{i}", width, 3, 1, activation))
            kernel_size, width = (1 if block == self.num_blocks else 3), 2 * width
            layers.append(self.conv(f"block{block}_conv{per_block - 1}", width, kernel_size, 2, activation))
        return layers

    def _pooled(self) -> list:
        activation, pooling = ALL_ACTIVATIONS[self.activation], POOLINGS[self.pooling]
        per_block, width = self.depth // self.num_blocks, self.width
        layers = [self.conv("stem", width, 3, 1, activation)]
        for block in range(1, self.num_blocks):
            for i in range(per_block - 1):
                layers.append(self.conv(f"block{block}_conv{i}", width, 3, 1, activation))
            layers.append(self.conv(f"block{block}_conv{per_block - 1}", 4 * width, 3, 2, pooling))
            width *= 2
        last = activation if self.head == "mlp" else pooling
        for i in range(per_block):
            after = last if i == per_block - 1 else activation
            layers.append(self.conv(f"block{self.num_blocks}_conv{i}", 4 * width, 1, 1 if i else 2, after))
        return layers

    def layers(self):
        layers = self._pooled() if self.variant == "pooled" else self._plain()
        if self.head == "mlp":
            head = MLPHead(self.num_classes, self.head_features, name="head")
        elif self.head == "orthonormal":
            head = self.orthonormal_head()
        else:
            head = LinearHead(self.num_classes, self.head == "lln", name="head")
        return [*layers, flatten], head
