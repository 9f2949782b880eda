"""Frozen networks: float64 host arrays that certify, save and load. docs/soundness.md says what is proved."""

import functools
import os
from collections.abc import Sequence

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from lipjax import bounds, operators, shipping
from lipjax.certify import layout
from lipjax.certify.certificate import CLAIM, Certificate, certify_margins
from lipjax.certify.float64 import check_arithmetic, checked_images, evaluate_in_batches, float64_on_cpu, host_float64
from lipjax.certify.mlp import MLPCertifier
from lipjax.errors import NotCertifiable, UserError
from lipjax.network import Network, check_network, table_of
from lipjax.numerics import gamma


def _read_only(array) -> np.ndarray:
    copy = np.array(array)
    copy.setflags(write=False)
    return copy.view()  # owns nothing, so that it cannot be made writable again


class FrozenNetwork:
    """A network of float64 host arrays, the object that a certificate is about.

    `frozen(x)` gives logits; `certify` proves radii; `save` and `load` keep it as safetensors and JSON.
    `class_names`: what people call the classes, in their order, or None. No claim is about them: they are saved beside
    the network, and are no part of its hash. `dtype`: the type in which files hold the arrays, "float64" or "float32",
    which takes a network whose arrays hold float32 numbers alone (`lipjax.freeze(..., dtype="float32")` rounds them).

    Example: logits that are the two pixels; the examples of the methods go on from here.
      >>> head = lipjax.operators.LinearHead(np.eye(2), np.zeros(2))
      >>> network = lipjax.network.make_network([("dense", lipjax.operators.Dense(np.eye(2)))], head)
      >>> frozen = lipjax.freeze(network)
    """

    def __init__(self, network: Network, class_names: Sequence[str] | None = None, dtype: str = "float64"):
        """Takes copies of the network's arrays, which cannot be written to.

        Raises: ValueError if they are not finite float64, do not fit each other, hold numbers that the dtype does not,
          or class_names are not one text for each class.
        """
        bad = [
            jax.tree_util.keystr(path)
            for path, a in jax.tree_util.tree_leaves_with_path(network)
            if np.asarray(a).dtype != np.float64 or not np.isfinite(a).all()
        ]
        if bad:
            raise ValueError(
                f"A frozen network holds finite float64 arrays; these are not: {', '.join(bad)}. "
                "(lipjax.freeze(network) makes shorter types longer.)"
            )
        check_network(network)
        layout.check_dtype(network, dtype)
        self.network, self.dtype = jax.tree.map(_read_only, network), dtype
        self.class_names = layout.checked_names(class_names, self.num_classes)

    def __repr__(self) -> str:
        return table_of(self.network, "FrozenNetwork")

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.network.in_shape

    @property
    def num_classes(self) -> int:
        return self.network.num_classes

    @functools.cached_property
    def _bounds(self) -> list[bounds.LayerBound]:
        check_arithmetic()
        return bounds.operator_bounds(self.network)

    @functools.cached_property
    def _margin_lipschitz(self) -> np.ndarray:
        product = bounds.margin_lipschitz_bound(self.network, self._bounds)
        return product if self._liplt is None else np.minimum(product, self._liplt[0])

    @functools.cached_property
    def _liplt(self) -> tuple[np.ndarray, bounds.LipLTReport] | None:
        if not bounds.has_liplt(self.network):
            return None
        try:
            return bounds.margin_liplt_bound(self.network)
        except NotCertifiable:  # numbers beyond float64; layers without a proof are refused by the product
            return None

    @functools.cached_property
    def head_lipschitz(self) -> np.ndarray:
        """Proved constants (k, k) of all logit differences, per unit of the features: those of the head alone."""
        return self.network.head.pairwise_bound()

    @functools.cached_property
    def _mlp(self) -> MLPCertifier:
        return MLPCertifier(self.network.head)

    def margin_lipschitz(self) -> np.ndarray:
        """Proved (k, k) float64 bound of the Lipschitz constants of all logit differences, per pixel unit.

        The product of norms; where all activations are elementwise, the least of that and what LipLT proves.

        Returns: (k, k), diagonal 0; not to be written to.
        Raises: NotCertifiable naming the layer that has no proved bound.
        Example:
          >>> bool(2**0.5 <= frozen.margin_lipschitz()[0, 1] < 1.4143)
          True
        """
        return self._margin_lipschitz

    def lipschitz_report(self) -> list[bounds.LayerBound]:
        """Proved bounds of all operators, for people.

        Returns: a `bounds.LayerBound` of each, in order: name, type, proved bound and method.
        Raises: NotCertifiable naming the layer that has no proved bound.
        Example:
          >>> [(row.name, row.type) for row in frozen.lipschitz_report()]
          [('input', 'Normalize'), ('dense', 'Dense')]
        """
        return self._bounds

    def liplt_report(self) -> bounds.LipLTReport | None:
        """The report of how LipLT's constants were proved: per activation, per chain of linear operators, of outputs.

        Returns: a `bounds.LipLTReport`; None for a network that LipLT does not take (as `bounds.has_liplt` says), that
          has layers without a proof, or whose constants leave the range of float64.
        Example: without an activation the product of norms is all there is.
          >>> frozen.liplt_report() is None
          True
        """
        return None if self._liplt is None else self._liplt[1]

    def head_report(self) -> dict | None:
        """The basis of radii by an MLP head: the bound of |W1| and the curvatures that certificates needed so far.

        Returns: "norm" and "curvatures" ([[i, j, bound], ...]), as in certificate.json; None for other heads.
        Example:
          >>> frozen.head_report() is None
          True
        """
        return self._mlp.document() if isinstance(self.network.head, operators.MLPHead) else None

    def norm_estimates(self, vectors: dict | None = None, num_iters: int = 200) -> dict[str, float]:
        """Power-iteration estimates of the operators' norms in float64, for judging how tight the bounds are.

        Args:
          vectors: start vectors by operator name, such as those of training; random ones by default.
          num_iters: steps of power iteration.
        Returns: operator name -> estimate, in the unit of its input; not above the norm but for rounding.
        Example:
          >>> {name: round(norm, 6) for name, norm in frozen.norm_estimates().items()}
          {'dense': 1.0}
        """
        with float64_on_cpu():
            network = jax.tree.map(jnp.asarray, self.network)
            if vectors is None:
                vectors = bounds.init_vectors(network, jax.random.key(0))
            vectors = {name: jnp.asarray(host_float64(v)) for name, v in vectors.items()}
            sigmas, _ = jax.jit(bounds.norm_estimates, static_argnums=2)(network, vectors, num_iters)
            return {name: float(sigma) for name, sigma in sigmas.items()}

    def check_images(self, images) -> np.ndarray:
        """The images in float64. Raises: UserError for another shape, a type that is rounded, pixels beyond [0, 1]."""
        return checked_images(images, self.in_shape)

    def evaluate(self, images, norms: tuple, batch_size: int) -> list[np.ndarray]:
        """Evaluates all images in float64, batch by batch, with bounds of what rounding does to them.

        Args:
          images: (n, *in_shape), float64 as `check_images` returns them.
          norms: of the normalisation and every operator, those of `LayerBound.norms`; zeros if errors do not matter.
          batch_size: images evaluated at a time.
        Returns: logits (n, k), features (n, d), bounds of the l2 errors of the features (n,) and of the head's own
          errors of the logits (n, k).
        Raises: ValueError if batch_size < 1.
        Example:
          >>> logits, *_ = frozen.evaluate(np.array([[0.75, 0.25]]), (0.0, 0.0), 1)
          >>> logits.tolist()
          [[0.75, 0.25]]
        """
        return evaluate_in_batches(self.network, images, norms, batch_size)

    def __call__(self, images, batch_size: int = 256) -> np.ndarray:
        """Logits in float64, as `certify` computes them.

        Args:
          images: (n, *in_shape), floats in [0, 1].
          batch_size: images evaluated at a time.
        Returns: (n, k).
        Raises: UserError for other images.
        Example:
          >>> frozen(np.array([[0.75, 0.25]])).tolist()
          [[0.75, 0.25]]
        """
        # Norms serve the error bounds only.
        unasked = [
            (0.0, (0.0,) * len(op.parts())) if isinstance(op, operators.Composite) else 0.0 for op in self.network.ops
        ]
        return self.evaluate(self.check_images(images), (0.0, *unasked), batch_size)[0]

    def margins(self, images, batch_size: int = 256) -> tuple[np.ndarray, np.ndarray]:
        """Predictions (n,) and lower bounds (n, k) of logit[prediction] - logit[i] in exact real arithmetic.

        The rounding error of the float64 evaluation is bounded for each image and subtracted.

        Args:
          images: (n, *in_shape), floats in [0, 1].
          batch_size: images evaluated at a time.
        Returns: predictions (n,) and margins (n, k), not above 0 at the prediction itself.
        Raises: UserError for other images; NotCertifiable naming the layer that has no proved bound.
        Example:
          >>> predictions, margins = frozen.margins(np.array([[0.75, 0.25]]))
          >>> predictions.tolist(), bool(0.499 < margins[0, 1] <= 0.5)
          ([0], True)
        """
        logits, _, error, head_error = self._run_with_errors(images, batch_size)
        predicted = np.argmax(logits, axis=1)
        return predicted, self._lower_margins(predicted, logits, error, head_error)

    def _run_with_errors(self, images, batch_size: int) -> list[np.ndarray]:
        check_arithmetic()
        return self.evaluate(self.check_images(images), tuple(row.norms for row in self._bounds), batch_size)

    def _lower_margins(self, predicted, logits, error, head_error) -> np.ndarray:
        """Lower bounds (n, k) of the margins, for features that are off by at most error (n,).

        Twice the error is subtracted, so that another evaluation, off by as much, proves the result as well.
        """
        rows = np.arange(len(logits))
        with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN end as radius 0
            gaps = logits[rows, predicted][:, None] - logits
            slack = self.head_lipschitz[predicted] * error[:, None]
            slack = slack + head_error + head_error[rows, predicted][:, None]
            slack = slack * (1 + gamma(8)) + gamma(2) * np.abs(gaps)
            return np.nextafter(gaps - 2 * slack, -np.inf)

    def certify(self, images, batch_size: int = 256) -> Certificate:
        """Proves, for each image, a radius inside which the class computed in exact arithmetic cannot change.

        Args:
          images: (n, *in_shape), floats in [0, 1]. NaN pixels give radius 0.
          batch_size: images evaluated at a time.
        Returns: Certificate, its radii (n,) in pixel units; all rivals are checked; ties and what is not finite give 0.
        Raises: UserError for images of another shape, type or range; NotCertifiable if a layer has no proved bound.
        Example: the exact radius is 0.5 / sqrt(2), and the proved one slightly less.
          >>> bool(0.3535 < frozen.certify(np.array([[0.75, 0.25]])).radii[0] < 0.5 / 2**0.5)
          True
        """
        logits, features, error, head_error = self._run_with_errors(images, batch_size)
        predicted = np.argmax(logits, axis=1)
        margins = self._lower_margins(predicted, logits, error, head_error)
        if not isinstance(self.network.head, operators.MLPHead):
            return certify_margins(predicted, margins, self.margin_lipschitz())
        # Its logit differences vary less near the features than their global constants say.
        head_margins = self._lower_margins(predicted, logits, np.zeros_like(error), head_error)
        lipschitz = bounds.product_bound(self._bounds)
        return self._mlp.certify(predicted, margins, features, error, head_margins, lipschitz)

    def predict(self, images, batch_size: int = 256) -> tuple[np.ndarray, np.ndarray]:
        """Classes, from 0, and proved radii inside which they cannot change: `certify` for services.

        Pixels outside [0, 1] are refused as everywhere in this class, though the proof would hold: mostly nobody has
        divided them by 255. NaN pixels, to which `certify` gives radius 0, are refused, too.

        Args:
          images: (n, *in_shape), float32 or float64 in [0, 1]; of one image, image[None].
          batch_size: images evaluated at a time.
        Returns: (n,) integers; (n,) l2 radii in pixel units.
        Raises: UserError (a ValueError) for other images; NotCertifiable if a layer has no proved bound.
        Example:
          >>> classes, radii = frozen.predict(np.array([[0.75, 0.25]]))
          >>> classes.tolist(), f"{radii[0]:.3f}"
          ([0], '0.354')
        """
        pixels = self.check_images(images)
        wrong = np.flatnonzero(np.isnan(pixels).any(axis=tuple(range(1, pixels.ndim))))
        if len(wrong):
            what = f"but {len(wrong)} of {len(pixels)} images hold NaN, the first of them image {wrong[0]}"
            raise UserError(f"Expected pixels in [0, 1], {what}: mend these images or leave them out.")
        certificate = self.certify(pixels, batch_size)
        return certificate.predictions, certificate.radii

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by the names that network.safetensors has them under.

        Returns: ops/<name>/<field>, of a composite's parts ops/<name>/<place>/<field>, head/<field>, input_mean and
          input_std -> float64 array, not to be written to.
        Example:
          >>> {name: array.shape for name, array in frozen.arrays().items()}
          {'ops/dense/matrix': (2, 2), 'head/matrix': (2, 2), 'head/bias': (2,), 'input_mean': (1,), 'input_std': (1,)}
        """
        return layout.arrays_of_network(self.network)

    def sha256(self) -> str:
        """Hash of the network: its layout and the bytes of its arrays in float64, as 64 hexadecimal digits."""
        return layout.sha256_of(self.network)

    def array_hashes(self) -> dict[str, str]:
        """SHA-256 of the bytes of every array in float64, by name."""
        return layout.array_hashes_of(self.network)

    def export(self, dtype: str = "float32", platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")) -> bytes:
        """Pixels (b, *in_shape) -> logits (b, k) as a StableHLO program with all weights, for any batch size b.

        It runs where JAX is and lipjax is not, with products of the platform's highest precision. A certificate speaks
        of exact arithmetic on the float64 arrays, which a float32 program rounds.

        Args:
          dtype: "float32" or "float64", of pixels, weights and logits; to call a float64 program takes jax_enable_x64.
          platforms: what it is compiled for later.
        Returns: the serialized program.
        Raises: ValueError for another dtype or an unknown platform.
        Example:
          >>> import jax.export
          >>> program = jax.export.deserialize(bytearray(frozen.export()))
          >>> program.call(np.array([[0.75, 0.25]], np.float32)).tolist()
          [[0.75, 0.25]]
        """
        if dtype not in ("float32", "float64"):
            raise ValueError(f"Expected dtype 'float32' or 'float64', got {dtype!r}.")
        with float64_on_cpu():
            network = jax.tree.map(lambda a: jnp.asarray(a, dtype), self.network)
            (batch,) = jax.export.symbolic_shape("b")
            pixels = jax.ShapeDtypeStruct((batch, *self.in_shape), dtype)
            program = jax.export.export(jax.jit(network.__call__), platforms=platforms)(pixels)
        return bytes(program.serialize())

    def to_onnx(self, path: str | os.PathLike) -> None:
        """Writes an ONNX file: pixels (b, *in_shape) to logits (b, k), in float32, of plain operators of opset 17.

        It computes what the network computes, operator by operator, so that the bounds of float32 errors in a report
        are true of it where the runtime is as docs/shipping.md says.

        Args:
          path: of the file, which appears whole or not at all.
        Returns: nothing.
        Raises: UserError (a ValueError) naming an operator that has no translation, for arrays that float32 does not
          hold, and for networks beyond 2 GB; MissingExtra without the package onnx.
        Example:
          >>> frozen.to_onnx(os.path.join(directory, "network.onnx"))
        """
        shipping.write_onnx(path, self.network, {"claim": CLAIM, "frozen_sha256": self.sha256()})

    def to_torch_state(self) -> dict[str, np.ndarray]:
        """Arrays for layers of PyTorch, by the names that a module's `load_state_dict` takes: docs/shipping.md.

        Weights of `Conv2d` (OIHW), `ConvTranspose2d` and `Linear`, with the bias behind them, under the operator's name
        ("/" becomes "."), the head as "head", and input_mean and input_std. Columns of what follows a `Flatten` are in
        the order of images with channels first. Activations and reorderings have no arrays.

        Returns: name -> float64 array, which `torch.as_tensor` takes.
        Raises: UserError naming an operator with arrays that no plain layer of PyTorch holds.
        Example:
          >>> {name: array.shape for name, array in frozen.to_torch_state().items()}
          {'dense.weight': (2, 2), 'head.weight': (2, 2), 'head.bias': (2,), 'input_mean': (1,), 'input_std': (1,)}
        """
        return shipping.torch_state(self.network)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes network.safetensors, then network.json with the hash of both; each appears whole or not at all.

        Args:
          directory: made where it is missing.
        Returns: nothing.
        Example:
          >>> frozen.save(directory)
          >>> sorted(os.listdir(directory))
          ['network.json', 'network.safetensors']
        """
        layout.save_network(directory, self.network, self.class_names, self.dtype, CLAIM)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "FrozenNetwork":
        """Reads what `save` wrote.

        Args:
          directory: that of `save`.
        Returns: the same network.
        Raises: UserError if a file is missing, damaged, of another format or schema, or the hash does not fit.
        Example:
          >>> frozen.save(directory)
          >>> lipjax.FrozenNetwork.load(directory).sha256() == frozen.sha256()
          True
        """
        document, arrays = layout.read_network(directory)
        try:
            dtype = layout.dtype_of(arrays)
            frozen = cls(layout.rebuild(document, layout.in_float64(arrays)), dtype=dtype)
            frozen.class_names = layout.checked_names(document.get("class_names"), frozen.num_classes)
            digest = frozen.sha256()
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
            raise UserError(f"{directory}: layout and arrays do not fit each other ({error}).") from error
        if digest != document.get("sha256"):
            raise UserError(f"{directory}: the arrays do not have the recorded hash; a file was changed or damaged.")
        return frozen
