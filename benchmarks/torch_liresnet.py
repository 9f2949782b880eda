"""A training step of LiResNet in PyTorch, from the formulas of arXiv:2301.12549, on the same weights as ours.

Used by accelerator.py. Every linear layer has the norm of a warm power iteration in float32, with its gradient; blocks
are one convolution each, I + L^(-1/2) gamma W; the loss is EMMA; the optimiser is AdamW with decoupled decay.
"""

import contextlib
import math
from typing import Any

import numpy as np
from optional_torch import tf, torch


def _maxmin(x):
    a, b = x.chunk(2, dim=1)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


class Layer:
    """A convolution or a dense layer: its kernel as applied, and the norm of that.

    Args: parameters: of ours, by name. vector: the start of the power iteration, of one input. depth: L of a residual
      block, 0 of another layer.
    """

    def __init__(self, parameters, vector, device, strides=1, padding=0, depth=0):
        self.strides, self.padding, self.depth = strides, padding, depth
        self.bias = _leaf(parameters["bias"], device)
        weight = next(parameters[name] for name in ("weight", "kernel", "matrix") if name in parameters)
        self.dense = np.ndim(weight) == 2
        self.weight = _leaf(weight if self.dense else np.transpose(weight, (3, 2, 0, 1)), device)
        self.gamma: Any = _leaf(parameters["gamma"], device) if depth else None
        start = np.asarray(vector) if self.dense else np.transpose(vector, (2, 0, 1))[None]
        self.vector = torch.tensor(np.ascontiguousarray(start), device=device)
        if not self.dense and device.type == "cuda":
            self.weight = self.weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()

    @property
    def parameters(self):
        return [p for p in (self.weight, self.bias, self.gamma) if p is not None]

    def kernel(self):
        """The kernel that is applied: of a block the identity and what is added to it, in one."""
        if not self.depth:
            return self.weight
        channels, _, side, _ = self.weight.shape
        identity = torch.zeros_like(self.weight)
        identity[:, :, side // 2, side // 2] = torch.eye(channels, device=self.weight.device)
        return identity + self.depth**-0.5 * self.gamma.view(-1, 1, 1, 1) * self.weight

    def linear(self, kernel, x):
        if self.dense:
            return tf.linear(x, kernel)
        return tf.conv2d(x, kernel, stride=self.strides, padding=self.padding)

    def adjoint(self, kernel, y):
        if self.dense:
            return y @ kernel
        taken = [
            (n - 1) * self.strides + k - 2 * self.padding for n, k in zip(y.shape[2:], kernel.shape[2:], strict=True)
        ]
        extra = [n - m for n, m in zip(self.vector.shape[2:], taken, strict=True)]
        return tf.conv_transpose2d(y, kernel, stride=self.strides, padding=self.padding, output_padding=extra)

    def norm(self, kernel, num_iters):
        """sigma = |A v| with v held constant, after so many steps of power iteration, which are kept."""
        with torch.no_grad():
            v = self.vector / self.vector.norm()
            for _ in range(num_iters):
                v = self.adjoint(kernel, self.linear(kernel, v))
                v = v / v.norm()
            self.vector = v
        return self.linear(kernel, v).norm()

    def __call__(self, kernel, x):
        bias = self.bias if self.dense else self.bias[:, None, None]
        return _maxmin(self.linear(kernel, x) + bias)


def _leaf(array, device):
    return torch.tensor(np.ascontiguousarray(array), device=device, requires_grad=True)


class LiResNet:
    """The network, its loss and its step.

    Args: model, params, vectors: of ours (NumPy), `lipjax.models.LiResNet` with its defaults of 2023.
    """

    def __init__(self, model, params, vectors, device, *, num_iters, learning_rate, weight_decay):
        def layer(name, **options):
            return Layer(params[name], vectors[f"{name}/linear"], device, **options)

        self.num_iters = num_iters
        self.layers = [layer("stem", strides=model.stem_strides, padding=model.stem_padding)]
        self.layers += [layer(f"block_{i:02d}", padding=1, depth=model.depth) for i in range(1, model.depth + 1)]
        self.layers += [layer("neck_conv", strides=4), layer("neck_dense")]
        self.matrix, self.head_bias = (_leaf(params["head"][name], device) for name in ("matrix", "bias"))
        self.mean, self.std = (
            torch.tensor(a, device=device)[:, None, None] for a in (model.input_mean, model.input_std)
        )
        leaves = [p for one in self.layers for p in one.parameters] + [self.matrix, self.head_bias]
        self.optimizer = torch.optim.AdamW(leaves, learning_rate, weight_decay=weight_decay)

    def loss(self, pixels, labels, epsilon, autocast=None):
        """EMMA's mean. pixels: (b, 3, h, w) in [0, 1]. autocast: a context for all but the norms."""
        kernels = [layer.kernel() for layer in self.layers]
        norms = [layer.norm(kernel, self.num_iters) for layer, kernel in zip(self.layers, kernels, strict=True)]
        with contextlib.nullcontext() if autocast is None else autocast():
            x = (pixels - self.mean) / self.std
            for layer, kernel in zip(self.layers, kernels, strict=True):
                if layer.dense and x.ndim == 4:
                    x = x.permute(0, 2, 3, 1).flatten(1)  # ours has the channels last
                x = layer(kernel, x)
            rows = self.matrix / self.matrix.norm(dim=1, keepdim=True)
            logits = (tf.linear(x, rows) + self.head_bias).float()
        lipschitz = math.prod(norms[1:], start=norms[0]) / self.std.min()
        reach = epsilon * lipschitz * (rows[labels][:, None] - rows[None]).pow(2).sum(2).clamp_min(1e-20).sqrt()
        z = logits - logits.gather(1, labels[:, None])
        factor = (-z / reach.clamp_min(1e-8)).clamp(0.01, 1.0).detach()
        own = tf.one_hot(labels, logits.shape[1]).bool()
        return tf.cross_entropy(torch.where(own, torch.zeros_like(z), z + reach * factor), labels)

    def step(self, pixels, labels, epsilon, autocast=None):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(pixels, labels, epsilon, autocast)
        loss.backward()
        self.optimizer.step()
        return loss.detach()
