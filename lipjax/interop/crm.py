"""Plain networks of the paper on certified radius maximisation."""

import numpy as np

from lipjax import conv
from lipjax.interop.entries import Entry, choose, conv_kernel, dense_matrix, known_options, plain
from lipjax.models import ConvNet


def crm(state_dict: dict, options: dict) -> tuple[ConvNet, list[Entry]]:
    """createNetwork of o4lc/CRM-LipLT: a Sequential with an activation after every layer but flatten and the last."""
    del state_dict
    unread = ("modelType", "perClassLipschitz", "pairwiseLipschitz", "numberOfPowerIterations", "weightInitialization")
    unread += ("device", "architecture", "numberOfClasses")
    read = {"layers": (), "activation": "relu", "inputShape": (3, 32, 32)}
    given = known_options("crm", options, {**read, **dict.fromkeys(unread)})
    activation = choose(given, "activation", {"relu": "relu", "tanh": "tanh"})
    layers, image = [tuple(layer) for layer in given["layers"]], tuple(given["inputShape"])
    if len(image) != 3:
        raise ValueError(f"inputShape: expected (channels, height, width), got {image}.")
    if not layers or layers[-1][0] != "linear":
        raise ValueError(f"layers: expected a linear layer at the end, got {layers}.")
    entries: list[Entry] = []
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
            weight = conv_kernel(f"{name}.weight", here, "kernel")
        elif kind == "linear" and len(sizes) == 2 and shape == (sizes[0],):
            shape = (sizes[1],)
            dense.append(sizes[1])
            here = "head" if i == len(layers) - 1 else f"dense_{len(dense):02d}"
            weight = dense_matrix(f"{name}.weight", unflattened, here, "matrix")
            unflattened = None
        else:
            raise ValueError(
                "layers: expected (conv2d, in, out, kernel, stride, padding), (flatten,) or (linear, in, out) that "
                f"takes the shape {shape} of what comes before, got {layer}."
            )
        entries += [weight, plain(f"{name}.bias", here, "bias")]
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
