"""Weights of the papers' PyTorch code as lipjax variables."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipjax import bounds, conv
from lipjax.models import ConvNet, LipConvnet, LiResNet
from lipjax.nn import COLLECTION, LipschitzModel

_ACTIVATIONS = {"maxmin": "maxmin", "hh1": "householder", "hh2": "householder2"}
_POOLINGS = {"max": "max", "lip1": "projection"}


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One array of a state dict: its name there, the collection and path here, and how it is transformed.

    back: the shape here to the shape there. part: (i, n) if it is the i-th of n arrays that are stacked there.
    """

    name: str
    collection: str
    path: tuple[str | int, ...]
    transform: Callable[[np.ndarray], np.ndarray]
    back: Callable[[tuple[int, ...]], tuple[int, ...]]
    part: tuple[int, int] | None = None


def from_torch(family: str, state_dict: dict[str, Any], **options) -> tuple[LipschitzModel, dict]:
    """The model and the variables that compute what a network of the papers' code computes.

    Args:
      family: "soc" (singlasahil14/SOC, arXiv:2108.04062) or "improved_l2" (singlasahil14/improved_l2_robustness,
        arXiv:2211.08453): the class LipConvNet of each; "crm" (o4lc/CRM-LipLT, arXiv:2310.00116): what its
        createNetwork makes of layers without batch normalisation; or "liresnet" (hukkai/liresnet, arXiv:2310.02513):
        the class GloroNet with LiResConv, Map2Vec and LiResMLP.
      state_dict: name -> array (anything that numpy.asarray takes), with the original's names and layouts. The
        original's state_dict() of "crm" networks has it under "original".
      options: the original constructor's arguments by name ("crm": the entries of networkConfiguration, of which
        layers, activation and inputShape are read; "liresnet": depth, width, input_size, num_classes and use_lln, and
        out_dim and mlp_depth, which are 2048 and 8 in the original).
    Returns: (model, variables): model.apply(variables, x), x NHWC, gives the original's logits in eval mode for the
      same network input, and model.apply(variables, x, train=True) those in train mode. "soc" and "crm" networks have
      no input normalisation of their own: give the model input_mean and input_std (`model.clone`) to certify in pixel
      units. Start vectors of norm estimates are drawn afresh ("liresnet": init_x is not read). A Cayley network of
      "soc" whose kernels exceed their map computes with cropped kernels; the taps that it crops are zero here.
    Raises: ValueError for an unknown family or option, and for missing, extra or misshapen arrays (naming the array and
      both shapes).
    """
    if family not in _FAMILIES:
        raise ValueError(f"Expected a family of {sorted(_FAMILIES)}, got {family!r}.")
    model, entries = _FAMILIES[family](state_dict, options)
    model.check()
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *model.input_shape)))
    arrays = {name: np.asarray(value) for name, value in state_dict.items()}
    expected = {entry.name: entry for entry in entries}
    unread = _IGNORED.get(family, ())
    ignored = {name for name in arrays if name in unread or name.rpartition(".")[2] in unread}
    missing, extra = sorted(expected.keys() - arrays), sorted(arrays.keys() - expected.keys() - ignored)
    if missing or extra:
        raise ValueError(f"The state dict of a {family!r} network lacks {missing or 'nothing'}, has extra {extra}.")
    variables = jax.tree.map(lambda leaf: None, dict(abstract), is_leaf=lambda leaf: hasattr(leaf, "shape"))
    for entry in entries:
        shape = _at(abstract[entry.collection], entry.path).shape
        wanted, array = entry.back(shape), arrays[entry.name]
        if entry.part is not None:
            wanted = (entry.part[1], *wanted)
        if array.shape != wanted:
            raise ValueError(f"{entry.name}: expected shape {wanted}, got {array.shape}.")
        if entry.part is not None:
            array = array[entry.part[0]]
        parent = _at(variables[entry.collection], entry.path[:-1])
        parent[entry.path[-1]] = jnp.asarray(entry.transform(array))
    variables[COLLECTION]["vectors"] = {}
    left = [jax.tree_util.keystr(path) for path, leaf in _leaves_with_none(variables) if leaf is None]
    if left:
        raise ValueError(f"The state dict leaves these without a value: {left}.")
    if abstract[COLLECTION]["vectors"]:
        network: Any = model.apply(variables, method="build")
        variables[COLLECTION]["vectors"] = bounds.init_vectors(network, jax.random.key(0))
    return model, variables


def _leaves_with_none(tree):
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None)


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


# State of the original that has no counterpart here: of a curvature estimate, constants that are checked apart,
# identities, start vectors, and matrices that evaluation derived from the weights.
_LIPCONVNET = ("correction", "logits_layer._v", "shift", "scale")
_IGNORED = {
    **dict.fromkeys(("crm", "improved_l2", "soc"), _LIPCONVNET),
    "liresnet": ("stem.0.init_x", "conv.init_x", "conv.identity", "linear.identity", "linear.eval_weight"),
}


def _same(name: str, *path) -> _Entry:
    """An array whose layout is the same on both sides."""
    return _Entry(name, "params", path, lambda a: a, lambda shape: shape)


def _kernel(name: str, *path, keep: int | None = None) -> _Entry:
    """A convolution kernel, OIHW there; keep: taps from here on are zero."""

    def transform(array):
        kernel = np.transpose(array, (2, 3, 1, 0)).copy()
        if keep is not None:
            kernel[keep:] = 0
            kernel[:, keep:] = 0
        return kernel

    return _Entry(name, "params", path, transform, lambda s: (s[3], s[2], s[0], s[1]))


def _flat(name: str, array, *path) -> _Entry:
    """A vector, which may have axes of length 1 there."""
    there = np.shape(array)

    def back(shape):
        return there if int(np.prod(there)) == shape[0] and max(there, default=1) == shape[0] else shape

    return _Entry(name, "params", path, lambda a: a.reshape(-1), back)


def _choose(options: dict, name: str, known: dict[str, str]) -> str:
    value = options.pop(name)
    if value not in known:
        raise ValueError(f"{name}: expected one of {sorted(known)}, got {value!r}.")
    return known[value]


def _known_options(family: str, options: dict, defaults: dict) -> dict:
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        raise ValueError(f"{family!r} networks have the options {sorted(defaults)}, got {unknown}.")
    return {**defaults, **options}


def _angles(state_dict: dict, prefix: str, activation: str, *path) -> Iterator[_Entry]:
    names = {"householder": ["theta"], "projection": ["theta"], "householder2": ["theta0", "theta1", "theta2"]}
    for name in names.get(activation, []):
        yield _flat(f"{prefix}.{name}", state_dict.get(f"{prefix}.{name}", ()), *path, name)


def _soc(state_dict: dict, options: dict) -> tuple[LipConvnet, list[_Entry]]:
    """LipConvNet of singlasahil14/SOC."""
    defaults = {"conv_name": "soc", "activation": "maxmin", "init_channels": 32, "block_size": 1, "num_classes": 10}
    given = _known_options("soc", options, {**defaults, "input_side": 32, "lln": False})
    layer = _choose(given, "conv_name", {"soc": "soc", "cayley": "cayley"})
    activation = _choose(given, "activation", _ACTIVATIONS)
    side, per_block = given["input_side"], given["block_size"]
    model = LipConvnet(
        (side, side, 3),
        given["num_classes"],
        depth=5 * per_block,
        width=given["init_channels"],
        layer=layer,
        activation=activation,
        head="lln" if given["lln"] else "orthonormal",
    )
    entries = []
    for block in range(1, 6):
        for i in range(per_block):
            prefix, name = f"layer{block}.{i}", f"block{block}_conv{i}"
            entries += _soc_conv(state_dict, f"{prefix}.conv", name, layer, side // 2 ** (block - 1))
            entries += _angles(state_dict, f"{prefix}.activation", activation, name, "activation")
    if given["lln"]:
        entries += [_same("last_layer.weight", "head", "matrix"), _same("last_layer.bias", "head", "bias")]
    elif layer == "soc":
        entries += _soc_conv(state_dict, "last_layer", "head", layer, 1)
    else:
        entries += [_same(f"last_layer.{there}", "head", here) for there, here in _CAYLEY_DENSE]
    return model, entries


_CAYLEY_DENSE = (("weight", "matrix"), ("alpha", "alpha"), ("bias", "bias"))


def _soc_conv(state_dict: dict, prefix: str, name: str, layer: str, side: int) -> list[_Entry]:
    bias = _same(f"{prefix}.bias", name, "bias")
    if layer == "cayley":
        # A kernel that exceeds its map was cropped by the padded transform of the original.
        return [_kernel(f"{prefix}.weight", name, "kernel", keep=side), _same(f"{prefix}.alpha", name, "alpha"), bias]
    correction = f"{prefix}.correction"
    if correction in state_dict:
        raw = np.shape(state_dict.get(f"{prefix}.random_conv_filter", ()))
        expected = 1.0 if raw[-1:] == (1,) else 0.7
        found = np.asarray(state_dict[correction]).reshape(-1)
        if found.shape != (1,) or abs(float(found[0]) - expected) > 1e-6:
            raise ValueError(f"{correction}: expected shape (1,) and the value {expected}, got {found}.")
    return [_kernel(f"{prefix}.random_conv_filter", name, "kernel"), bias, *_power_vectors(f"{prefix}.", name)]


def _power_vectors(prefix: str, name: str) -> Iterator[_Entry]:
    """The vectors of the normalisation, OIHW there as the kernel is."""
    for vector in ("u1", "v1", "u2", "v2", "u3", "v3", "u4", "v4"):
        path = (name, "kernel_vectors", vector)
        back = lambda s: (s[3], s[2], s[0], s[1])  # noqa: E731
        yield _Entry(f"{prefix}{vector}", COLLECTION, path, lambda a: np.transpose(a, (2, 3, 1, 0)), back)


def _improved(state_dict: dict, options: dict) -> tuple[LipConvnet, list[_Entry]]:
    """LipConvNet of singlasahil14/improved_l2_robustness."""
    defaults = {"conv_name": "soc", "activation_name": "maxmin", "pooling_name": "max", "last_name": "crc_full"}
    sizes = {"init_channels": 32, "block_size": 1, "num_hidden": 4096, "num_classes": 10, "input_size": 32}
    given = _known_options("improved_l2", options, {**defaults, **sizes})
    _choose(given, "conv_name", {"soc": "soc"})
    activation = _choose(given, "activation_name", _ACTIVATIONS)
    pooling = _choose(given, "pooling_name", _POOLINGS)
    head = _choose(given, "last_name", {"crc_full": "mlp", "lln": "lln"})
    side, per_block = given["input_size"], given["block_size"]
    mean, std = (
        tuple(np.asarray(state_dict.get(name, default), float).reshape(-1).tolist())
        for name, default in (("shift", (0.0,)), ("scale", (1.0,)))
    )
    model = LipConvnet(
        (side, side, 3),
        given["num_classes"],
        mean,
        std,
        depth=5 * per_block,
        width=given["init_channels"],
        variant="pooled",
        activation=activation,
        pooling=pooling,
        head=head,
        head_features=given["num_hidden"],
        train_terms=5,
        eval_terms=14,
        scale=1.0,
        fast_gradient=True,
    )
    entries = _improved_conv(state_dict, "init_layer", "stem", activation)
    for block in range(1, 6):
        for i in range(per_block):
            last = i == per_block - 1
            pooled = last and not (block == 5 and head == "mlp")
            entries += _improved_conv(
                state_dict, f"block{block}.{i}", f"block{block}_conv{i}", pooling if pooled else activation
            )
    if head == "mlp":
        for layer, weight, bias in (("linear1", "w1", "b1"), ("linear2", "w2", "b2")):
            entries += [_same(f"logits_layer.{layer}.weight", "head", weight)]
            entries += [_same(f"logits_layer.{layer}.bias", "head", bias)]
        same = ("logits_layer._u", COLLECTION, ("head", "vector"))
        entries.append(_Entry(*same, lambda a: a, lambda shape: shape))
    else:
        entries += [_same("logits_layer.weight", "head", "matrix"), _same("logits_layer.bias", "head", "bias")]
    return model, entries


def _improved_conv(state_dict: dict, prefix: str, name: str, activation: str) -> list[_Entry]:
    module = "pooling" if activation in ("max", "projection") else "activation"
    return [
        _kernel(f"{prefix}.ortho.weight", name, "kernel"),
        _same(f"{prefix}.ortho.bias", name, "bias"),
        *_power_vectors(f"{prefix}.ortho._", name),
        *_angles(state_dict, f"{prefix}.act", activation, name, module),
    ]


def _crm(state_dict: dict, options: dict) -> tuple[ConvNet, list[_Entry]]:
    """createNetwork of o4lc/CRM-LipLT: a Sequential with an activation after every layer but flatten and the last."""
    del state_dict
    unread = ("modelType", "perClassLipschitz", "pairwiseLipschitz", "numberOfPowerIterations", "weightInitialization")
    unread += ("device", "architecture", "numberOfClasses")
    read = {"layers": (), "activation": "relu", "inputShape": (3, 32, 32)}
    given = _known_options("crm", options, {**read, **dict.fromkeys(unread)})
    activation = _choose(given, "activation", {"relu": "relu", "tanh": "tanh"})
    layers, image = [tuple(layer) for layer in given["layers"]], tuple(given["inputShape"])
    if len(image) != 3:
        raise ValueError(f"inputShape: expected (channels, height, width), got {image}.")
    if not layers or layers[-1][0] != "linear":
        raise ValueError(f"layers: expected a linear layer at the end, got {layers}.")
    entries: list[_Entry] = []
    convs, dense, shape, unflattened, index = [], [], image, None, 0
    for i, layer in enumerate(layers):
        kind, *sizes = layer
        name = f"linear.{index}"
        if kind == "flatten":
            shape, unflattened, index = (int(np.prod(shape)),), shape, index + 1
            continue
        if kind == "conv2d" and 3 <= len(sizes) <= 5 and len(shape) == 3 and sizes[0] == shape[0]:
            features, side, strides, padding = (*sizes[1:], *(1, 0)[len(sizes) - 3 :])
            size = conv.output_size(shape[1:], (side, side), strides, ((padding, padding), (padding, padding)))
            shape = (features, *size)
            convs.append((features, side, strides, padding))
            here = f"conv_{len(convs):02d}"
            weight = _kernel(f"{name}.weight", here, "kernel")
        elif kind == "linear" and len(sizes) == 2 and shape == (sizes[0],):
            shape = (sizes[1],)
            dense.append(sizes[1])
            here = "head" if i == len(layers) - 1 else f"dense_{len(dense):02d}"
            weight = _matrix(f"{name}.weight", unflattened, here, "matrix")
            unflattened = None
        else:
            raise ValueError(
                "layers: expected (conv2d, in, out, kernel, stride, padding), (flatten,) or (linear, in, out) that "
                f"takes the shape {shape} of what comes before, got {layer}."
            )
        entries += [weight, _same(f"{name}.bias", here, "bias")]
        index += 2
    channels, height, width = image
    model = ConvNet(
        (height, width, channels),
        dense[-1],
        variant="custom",
        convs=tuple(convs),
        dense=tuple(dense[:-1]),
        activation=activation,
    )
    return model, entries


def _matrix(name: str, unflattened: tuple[int, ...] | None, *path) -> _Entry:
    """A dense matrix; unflattened: the shape (c, h, w), or (n,), whose flattening it takes there, as (h, w, c) here."""

    def transform(array):
        if unflattened is None or len(unflattened) == 1:
            return array
        return np.transpose(array.reshape(-1, *unflattened), (0, 2, 3, 1)).reshape(array.shape)

    return _Entry(name, "params", path, transform, lambda shape: shape)


def _liresnet(state_dict: dict, options: dict) -> tuple[LiResNet, list[_Entry]]:
    """GloroNet of hukkai/liresnet, of which the blocks and the dense layers are stacked arrays."""
    del state_dict
    sizes = {"depth": 12, "width": 128, "input_size": 32, "num_classes": 10, "out_dim": 2048, "mlp_depth": 8}
    given = _known_options("liresnet", options, {**sizes, "use_lln": True, "num_lc_iter": 10, "act_name": "MinMax"})
    _choose(given, "act_name", {"MinMax": "maxmin"})
    wrong = [name for name in sizes if type(given[name]) is not int or given[name] < 1]
    if wrong:
        raise ValueError(f"Expected positive integers for {wrong}, got {[given[name] for name in wrong]}.")
    depth, width, side, features = given["depth"], given["width"], given["input_size"], given["out_dim"]
    patch = round((width / 3) ** 0.5)
    stems = {32: (5, 2, 2), 64: (5, 2, 2), 224: (patch, patch, 0)}
    if side not in stems:
        raise ValueError(f"input_size: expected one of {sorted(stems)}, got {side}.")
    kernel, strides, padding = stems[side]
    model = LiResNet(
        (side, side, 3),
        given["num_classes"],
        0.5,
        depth=depth,
        width=width,
        stem_kernel=kernel,
        stem_strides=strides,
        stem_padding=padding,
        neck_features=features,
        head_normalize=bool(given["use_lln"]),
        neck="cholesky",
        dense_depth=given["mlp_depth"],
        centering=True,
        small_init=True,
    )
    grid = ((side + 2 * padding - kernel) // strides + 1) // 4
    if features > width * grid**2:
        # The original orthogonalises rows even then; here columns are, which is another matrix.
        raise ValueError(f"out_dim: expected at most the {width * grid**2} features of the map, got {features}.")
    entries = [_kernel("stem.0.weight", "stem", "kernel"), _same("stem.0.bias", "stem", "bias")]
    for i in range(depth):
        block, part = f"block_{i + 1:02d}", (i, depth)
        kernel_entry = _kernel("conv.weights", block, "weight")
        gamma = _Entry("conv.gamma", "params", (block, "gamma"), np.ravel, lambda s: (*s, 1, 1, 1))
        mean = dataclasses.replace(_same("conv.running_mean", block, "mean"), collection=COLLECTION)
        of_block = (kernel_entry, gamma, _same("conv.bias", block, "bias"), mean)
        entries += [dataclasses.replace(entry, part=part) for entry in of_block]
    entries += [
        _Entry("neck.kernel", "params", ("neck_conv", "kernel"), _patches, lambda s: (s[3], s[0] * s[1] * s[2])),
        _matrix("neck.weight", (width, grid, grid), "neck_dense", "matrix"),
        _same("neck.bias", "neck_dense", "bias"),
    ]
    if given["mlp_depth"]:
        gamma = _Entry("linear.gamma", "params", ("dense", "gamma"), lambda a: a[..., 0], lambda s: (*s, 1))
        entries += [_same("linear.weights", "dense", "weight"), gamma, _same("linear.bias", "dense", "bias")]
    entries += [_same("head.weight", "head", "matrix"), _same("head.bias", "head", "bias")]
    return model, entries


def _patches(matrix: np.ndarray) -> np.ndarray:
    """(out, in 4 4) -> HWIO."""
    return np.transpose(matrix.reshape(len(matrix), -1, 4, 4), (2, 3, 1, 0))


_FAMILIES = {"crm": _crm, "improved_l2": _improved, "liresnet": _liresnet, "soc": _soc}
