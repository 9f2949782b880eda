"""A training step of LiResNet in PyTorch, from the formulas of arXiv:2301.12549 and 2310.02513, on weights of ours.

Used by accelerator.py (the network of 2023) and liresnet.py (that of 2024). It follows the papers and what is known of
their code: norms by warm power iterations in float32, those of all blocks as one grouped convolution; Cholesky
orthogonalisation with its gradient in closed form; blocks as x + convolution where they are centred, else as one
convolution; EMMA; clipping and Lookahead, where asked for.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
from optional_torch import tf, torch


def _maxmin(x):
    a, b = x.chunk(2, dim=1)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


def _hwio(kernel):
    """A kernel of ours, or some, as PyTorch has it: OIHW."""
    return np.moveaxis(kernel, (-1, -2), (-4, -3))


def _cholesky_orthogonal() -> Callable:
    """The function x -> L^-1 x, L L^T = x x^T + ridge, of (..., out, in)."""

    class Orthogonal(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            gram = x @ x.mT
            ridge = 1e-3 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
            lower = torch.linalg.cholesky(gram + ridge[..., None, None] * torch.eye(gram.shape[-1], device=x.device))
            w = torch.linalg.solve_triangular(lower, x, upper=False)
            ctx.save_for_backward(lower, w)
            return w

        @staticmethod
        def backward(ctx, *gradients):
            lower, w = ctx.saved_tensors
            of_x = torch.linalg.solve_triangular(lower.mT, gradients[0], upper=True)
            half = torch.tril(lower.mT @ torch.tril(-of_x @ w.mT))
            whole = half + torch.tril(half, -1).mT
            return torch.linalg.solve_triangular(lower.mT, whole @ w, upper=True) + of_x

    return Orthogonal.apply


class Map:
    """A convolution of one image, or of one for each group, or a matrix: v -> A v and its adjoint, of one kernel."""

    def __init__(self, vector, strides=1, padding=0, groups=1):
        self.vector, self.strides, self.padding, self.groups = vector, strides, padding, groups

    def __call__(self, kernel, x, bias=None):
        if kernel.ndim == 2:
            return tf.linear(x, kernel, bias)
        return tf.conv2d(x, kernel, bias, stride=self.strides, padding=self.padding, groups=self.groups)

    def _adjoint(self, kernel, y):
        if kernel.ndim == 2:
            return y @ kernel
        sizes = zip(y.shape[2:], kernel.shape[2:], self.vector.shape[2:], strict=True)
        extra = [size - ((n - 1) * self.strides + k - 2 * self.padding) for n, k, size in sizes]
        options = {"stride": self.strides, "padding": self.padding, "groups": self.groups}
        return tf.conv_transpose2d(y, kernel, output_padding=extra, **options)

    def norms(self, kernel, num_iters):
        """(groups,): |A v| with v held constant, after so many steps of power iteration, which are kept."""

        def lengths(x):
            return x.reshape(self.groups, -1).norm(dim=1)

        def of_length_1(v):
            return (v.reshape(self.groups, -1) / lengths(v)[:, None]).reshape(v.shape)

        with torch.no_grad():
            v = of_length_1(self.vector)
            for _ in range(num_iters):
                v = of_length_1(self._adjoint(kernel, self(kernel, v)))
            self.vector = v
        return lengths(self(kernel, v))


class LiResNet:
    """The network, its loss and its step.

    Args:
      model: `lipjax.models.LiResNet`, of linear blocks. params, vectors: of ours (NumPy).
      optimizer: makes one of PyTorch's of a list of leaves. clip_norm, lookahead_period: 0: none.
      channels_last: the layout in memory, of images as well.
    """

    def __init__(
        self,
        model,
        params,
        vectors,
        device,
        *,
        num_iters: int,
        optimizer: Callable,
        clip_norm: float = 0.0,
        lookahead_period: int = 0,
        channels_last: bool = True,
    ):
        self.model, self.num_iters, self.device = model, num_iters, device
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.orthogonal = _cholesky_orthogonal()

        def leaf(array):
            return torch.tensor(np.ascontiguousarray(array), device=device, requires_grad=True)

        def vector(*names):
            return torch.tensor(np.concatenate([vectors[f"{name}/linear"] for name in names], -1), device=device)

        def images(*names):
            return vector(*names).permute(2, 0, 1)[None].contiguous()

        names = [f"block_{i:02d}" for i in range(1, model.depth + 1)]
        blocks = {name: np.stack([params[block][name] for block in names]) for name in ("weight", "gamma", "bias")}
        self.p = {
            "stem": leaf(_hwio(params["stem"]["kernel"])),
            "stem bias": leaf(params["stem"]["bias"]),
            "blocks": leaf(_hwio(blocks["weight"])),
            "gamma": leaf(blocks["gamma"][:, :, None, None, None]),
            "biases": leaf(blocks["bias"]),
            "neck": leaf(_hwio(params["neck_conv"]["kernel"])),
            "features": leaf(params["neck_dense"]["matrix"]),
            "features bias": leaf(params["neck_dense"]["bias"]),
            "head": leaf(params["head"]["matrix"]),
            "head bias": leaf(params["head"]["bias"]),
        }
        self.maps = {
            "stem": Map(images("stem"), model.stem_strides, model.stem_padding),
            "blocks": Map(images(*names), padding=1, groups=model.depth),
        }
        if model.neck == "free":
            self.p["neck bias"] = leaf(params["neck_conv"]["bias"])
            self.maps |= {"neck": Map(images("neck_conv"), 4), "features": Map(vector("neck_dense"))}
        if model.dense_depth:
            self.p |= {f"dense {name}": leaf(params["dense"][name]) for name in ("weight", "gamma", "bias")}
        self.centre, self.std = (
            torch.tensor(np.float32(a), device=device)[:, None, None] for a in (model.input_mean, model.input_std)
        )
        self.means = torch.zeros(model.depth, model.width, device=device)
        self.optimizer, self.clip_norm = optimizer(list(self.p.values())), clip_norm
        self.lookahead_period, self.steps = lookahead_period, 0
        self.slow = [p.detach().clone() for p in self.p.values()] if lookahead_period else []

    def build(self) -> dict[str, Any]:
        """The arrays that are applied."""
        p, model = self.p, self.model
        added = model.depth**-0.5 * p["gamma"] * p["blocks"]
        identity = torch.zeros_like(p["blocks"][0])
        identity[:, :, identity.shape[2] // 2, identity.shape[3] // 2] = torch.eye(model.width, device=self.device)
        built = {"stem": p["stem"], "added": added, "blocks": added + identity}
        neck, features = p["neck"], p["features"]
        if model.neck == "cholesky":
            neck, features = self.orthogonal(neck.flatten(1)).reshape(neck.shape), self.orthogonal(features)
        built |= {"neck": neck, "features": features}
        if model.dense_depth:
            eye = torch.eye(p["dense weight"].shape[-1], device=self.device)
            scale = model.dense_depth**-0.5 * p["dense gamma"][..., None]
            built["dense"] = self.orthogonal(eye + scale * p["dense weight"])
        rows = p["head"]
        built["rows"] = rows / rows.norm(dim=1, keepdim=True) if model.head_normalize else rows
        return built

    def lipschitz(self, built):
        """Of pixels -> features: the product of the norms that are not 1 by themselves."""
        kernels = {**built, "blocks": built["blocks"].flatten(0, 1)}
        norms = torch.cat([of.norms(kernels[name], self.num_iters) for name, of in self.maps.items()])
        return norms.prod() / self.std.min()

    def logits(self, built, pixels):
        """In a training step, where means are those of the batch. pixels: (b, 3, h, w) in [0, 1]."""
        p, model, means = self.p, self.model, []
        x = _maxmin(self.maps["stem"](built["stem"], (pixels - self.centre) / self.std, p["stem bias"]))
        for kernel, bias in zip(built["added" if model.centering else "blocks"], p["biases"], strict=True):
            kernel, padding = kernel.contiguous(memory_format=self.format), kernel.shape[2] // 2
            if not model.centering:
                x = _maxmin(tf.conv2d(x, kernel, bias, padding=padding))
                continue
            added = tf.conv2d(x, kernel, padding=padding)
            means.append(added.mean((0, 2, 3)))
            x = _maxmin(x + added + (bias - means[-1])[:, None, None])
        neck = built["neck"].contiguous(memory_format=self.format)
        x = tf.conv2d(x, neck, p.get("neck bias"), stride=4)
        x = _maxmin(x) if model.neck == "free" else x
        x = x.permute(0, 2, 3, 1).flatten(1)  # ours has the channels last
        x = _maxmin(tf.linear(x, built["features"], p["features bias"]))
        if model.dense_depth:
            for matrix, bias in zip(built["dense"], p["dense bias"], strict=True):
                x = _maxmin(tf.linear(x, matrix, bias))
        if means:
            self.means = 0.9 * self.means + 0.1 * torch.stack(means).detach()
        return (tf.linear(x, built["rows"]) + p["head bias"]).float()

    def loss(self, pixels, labels, epsilon, autocast=None):
        """EMMA's mean. autocast: a context for all that depends on images."""
        built = self.build()
        lipschitz, rows = self.lipschitz(built), built["rows"]
        with contextlib.nullcontext() if autocast is None else autocast():
            logits = self.logits(built, pixels)
        reach = epsilon * lipschitz * (rows[labels][:, None] - rows[None]).pow(2).sum(2).clamp_min(1e-20).sqrt()
        z = logits - logits.gather(1, labels[:, None])
        factor = (-z / reach.clamp_min(1e-8)).clamp(0.01, 1.0).detach()
        own = tf.one_hot(labels, logits.shape[1]).bool()
        return tf.cross_entropy(torch.where(own, torch.zeros_like(z), z + reach * factor), labels)

    def step(self, pixels, labels, epsilon, autocast=None):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(pixels, labels, epsilon, autocast)
        loss.backward()
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(list(self.p.values()), self.clip_norm)
        self.optimizer.step()
        self.steps += 1
        if self.lookahead_period and self.steps % self.lookahead_period == 0:
            with torch.no_grad():
                for p, slow in zip(self.p.values(), self.slow, strict=True):
                    slow += 0.5 * (p - slow)
                    p.copy_(slow)
        return loss.detach()
