"""Writes sequential_*.npz: logits of small PyTorch networks with random weights, and their ONNX files.

Run: python tests/golden/make_sequential.py      (needs torch, onnx and onnxscript; seeds are fixed)

Each file: param/<name in the state dict>; input/x (b, c, h, w); output/logits in float64; onnx/script and onnx/dynamo,
the bytes of ONNX files of the network in float32 by the two exporters, where it can be exported; meta with the shape of
the input and the layers as interop takes them: [kind, names of arrays in the state dict, options].
"""

import io
import json
import pathlib
import warnings

import numpy as np
import onnx
import torch
from torch import nn

HERE = pathlib.Path(__file__).parent


class GroupSort2(nn.Module):
    """Pairs of neighbouring channels, the smaller first, as torchlip's."""

    def forward(self, x):
        pairs = x.reshape(x.shape[0], -1, 2, *x.shape[2:])
        return torch.stack([pairs.amin(2), pairs.amax(2)], 2).reshape(x.shape)


class SortedPairs(nn.Module):
    """The same by torch.sort."""

    def forward(self, x):
        return torch.sort(x.reshape(x.shape[0], -1, 2, *x.shape[2:]), dim=2)[0].reshape(x.shape)


class Strided(nn.Module):
    """Channels 2i and 2i + 1, the larger first, by slices: all larger ones, then all smaller ones."""

    def forward(self, x):
        a, b = x[:, ::2], x[:, 1::2]
        return torch.stack([torch.maximum(a, b), torch.minimum(a, b)], 2).flatten(1, 2)


class MaxMin(nn.Module):
    """Channels i and i + c / 2, the larger first."""

    def forward(self, x):
        a, b = x.chunk(2, 1)
        return torch.cat([torch.max(a, b), torch.min(a, b)], 1)


class Normalize(nn.Module):
    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x):
        return (x - self.mean[:, None, None]) / self.std[:, None, None]


class FlattenLast(nn.Module):
    """Pixels first, channels last."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)


NEIGHBOURS, HALVES = {"pairs": "neighbours", "first": "min"}, {"pairs": "halves", "first": "max"}
STATISTICS = ("running_mean", "running_var", "weight", "bias")
W, B = ("weight",), ("weight", "bias")

# name -> (input shape, [(module, kind, arrays, options)], whether it can be exported)
NETWORKS = {
    "conv": (
        (3, 8, 8),
        [
            (Normalize([0.5, 0.4375, 0.375], [0.25, 0.5, 0.3125]), "normalize", ("mean", "std"), {}),
            (nn.Conv2d(3, 8, 3, stride=2, padding=1), "conv2d", B, {"stride": 2, "padding": 1}),
            (GroupSort2(), "maxmin", (), NEIGHBOURS),
            (nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), "conv2d", W, {"padding": [1, 1], "groups": 2}),
            (nn.BatchNorm2d(8), "batch_norm", STATISTICS, {}),
            (MaxMin(), "maxmin", (), HALVES),
            (SortedPairs(), "maxmin", (), NEIGHBOURS),
            (nn.AvgPool2d(2), "avg_pool2d", (), {"kernel_size": 2}),
            (nn.Flatten(), "flatten", (), {}),
            (nn.Linear(32, 6), "linear", B, {}),
            (nn.LeakyReLU(0.25), "leaky_relu", (), {"negative_slope": 0.25}),
            (nn.Linear(6, 4), "linear", B, {}),
        ],
        True,
    ),
    "last": (
        (2, 9, 6),
        [
            (
                nn.Conv2d(2, 6, (4, 3), stride=(2, 1), padding=(1, 0)),
                "conv2d",
                B,
                {"stride": [2, 1], "padding": [1, 0]},
            ),
            (Strided(), "maxmin", (), {"pairs": "neighbours", "first": "max"}),
            (nn.ReLU(), "relu", (), {}),
            (FlattenLast(), "flatten", (), {"order": "hwc"}),
            (nn.Linear(96, 8), "linear", B, {}),
            (GroupSort2(), "maxmin", (), NEIGHBOURS),
            (nn.Linear(8, 5, bias=False), "linear", W, {}),
        ],
        True,
    ),
    "dense": (
        (1, 4, 4),
        [
            (nn.Flatten(), "flatten", (), {}),
            (GroupSort2(), "maxmin", (), NEIGHBOURS),
            (nn.Linear(16, 8), "linear", B, {}),
            (nn.Tanh(), "tanh", (), {}),
            (nn.Linear(8, 6, bias=False), "linear", W, {}),
            (nn.BatchNorm1d(6), "batch_norm", STATISTICS, {}),
            (nn.Sigmoid(), "sigmoid", (), {}),
            (MaxMin(), "maxmin", (), HALVES),
        ],
        True,
    ),
    "around": (
        (2, 6, 8),
        [
            (
                nn.Conv2d(2, 4, (3, 5), padding=(1, 2), stride=2, padding_mode="circular"),
                *("conv2d", B, {"padding": [1, 2], "stride": 2, "padding_mode": "circular"}),
            ),
            (nn.ReLU(), "relu", (), {}),
            (nn.Conv2d(4, 6, (2, 3), padding="same", dilation=2), "conv2d", B, {"padding": "same", "dilation": 2}),
            (GroupSort2(), "maxmin", (), NEIGHBOURS),
            (nn.AdaptiveAvgPool2d(1), "adaptive_avg_pool2d", (), {"output_size": 1}),
            (nn.Flatten(), "flatten", (), {}),
        ],
        False,
    ),
}


def exported(net: nn.Sequential, x: torch.Tensor, dynamo: bool) -> np.ndarray:
    """The ONNX file of a network in float32, its batch open."""
    file = io.BytesIO()
    options = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)} if dynamo else {"dynamic_axes": {"x": {0: "b"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x.float(),), file, input_names=["x"], dynamo=dynamo, **options)
    model = onnx.load_from_string(file.getvalue())
    for item in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        item.ClearField("metadata_props")  # traces of the stack, with paths of the machine
        item.ClearField("doc_string")
    del model.graph.value_info[:]
    return np.frombuffer(model.SerializeToString(), np.uint8)


def write(name: str, shape, layers, exports: bool, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(*(layer[0] for layer in layers)).eval()
    with torch.no_grad():
        for key, value in net.state_dict().items():
            if value.is_floating_point() and not key.endswith((".mean", ".std")):
                drawn = torch.randint(-128, 129, value.shape, generator=generator) / 256
                value.copy_(drawn.abs() + 0.25 if key.endswith("running_var") else drawn)
    x = torch.rand(3, *shape, generator=generator, dtype=torch.float32)
    found = {f"param/{key}": value.numpy().astype(np.float32) for key, value in net.state_dict().items() if value.ndim}
    if exports:
        found |= {"onnx/script": exported(net, x, False), "onnx/dynamo": exported(net, x, True)}
    with torch.no_grad():
        found |= {"input/x": x.numpy(), "output/logits": net.double()(x.double()).numpy()}
    described = [
        [kind, {a: f"{i}.{a}" for a in arrays}, options] for i, (_, kind, arrays, options) in enumerate(layers)
    ]
    meta = {"source": f"torch {torch.__version__}", "seed": seed, "input_shape": shape, "layers": described}
    np.savez_compressed(HERE / f"sequential_{name}.npz", **found, meta=json.dumps(meta))


if __name__ == "__main__":
    for name, network in NETWORKS.items():
        write(name, *network)
