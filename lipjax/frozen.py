"""Frozen networks: a Network of float64 host arrays that certifies, saves and loads. See docs/soundness.md for what is proved."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from lipjax import bounds, operators
from lipjax.certify import Certificate, certify_margins, write_json
from lipjax.errors import UserError
from lipjax.network import Network

SCHEMA = 1
FORMAT = "lipjax-frozen-network"
_OPERATORS = {
    cls.__name__: cls for cls in (operators.Dense, operators.Conv, operators.Bias, operators.MaxMin, operators.Flatten)
}


@contextlib.contextmanager
def float64_on_cpu():
    """JAX in double precision on the host, whatever the process uses elsewhere."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def freeze(model, variables) -> "FrozenNetwork":
    """Builds the model's network in float64 and takes it to the host.

    Args:
      model: has `apply(variables, method="build")` that returns a Network, such as any model of lipjax.models.
      variables: its parameters and state, on any device and in any float type.
    Raises: ValueError if an array of the result is not finite or not float64.
    """
    variables = jax.tree.map(lambda a: _host_float64(a), variables)
    with float64_on_cpu():
        network = model.apply(jax.tree.map(jnp.asarray, variables), method="build")
        return FrozenNetwork(jax.tree.map(np.asarray, network))


def _host_float64(array):
    array = np.asarray(jax.device_get(array))
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


@jax.jit
def _evaluate(network: Network, norms: tuple, x):
    """Logits, a bound on the l2 error of the features, and a bound on the head's own error of each logit."""
    if x.dtype != jnp.float64 or any(a.dtype != jnp.float64 for a in jax.tree.leaves(network)):
        raise ValueError("Certification runs in float64: an array of another type reached it.")
    x = network.normalize(x)
    error = operators.gamma(3) * (1 + 1e-8) * operators.norm_per_image(x)
    for op, norm in zip(network.ops, norms, strict=True):
        # Three more roundings in this line, and the norm was rounded up.
        error = (norm * error + op.rounding_error(x)) * (1 + operators.gamma(4))
        x = op(x)
    return network.head(x), error, network.head.rounding_error(x)


class FrozenNetwork:
    """A network of float64 host arrays, the object that a certificate is about.

    `frozen(x)` gives logits; `certify` proves radii; `save` and `load` keep it as safetensors and JSON.
    """

    def __init__(self, network: Network):
        bad = [
            jax.tree_util.keystr(path)
            for path, a in jax.tree_util.tree_leaves_with_path(network)
            if np.asarray(a).dtype != np.float64 or not np.isfinite(a).all()
        ]
        if bad:
            raise ValueError(f"A frozen network holds finite float64 arrays; these are not: {', '.join(bad)}.")
        self.network = network

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.network.in_shape

    @property
    def num_classes(self) -> int:
        return self.network.num_classes

    @functools.cached_property
    def _bounds(self) -> list[bounds.LayerBound]:
        return bounds.operator_bounds(self.network)

    @functools.cached_property
    def _margin_lipschitz(self) -> np.ndarray:
        return bounds.margin_lipschitz_bound(self.network, self._bounds)

    def margin_lipschitz(self) -> np.ndarray:
        """Proved (k, k) float64 bound of the Lipschitz constants of all logit differences, per pixel unit.

        Raises: NotCertifiable naming the layer that has no proved bound.
        """
        return self._margin_lipschitz

    def lipschitz_report(self) -> list[bounds.LayerBound]:
        """Name, type, proved bound and method of every operator, in order."""
        return self._bounds

    def norm_estimates(self, vectors: dict | None = None, num_iters: int = 200) -> dict[str, float]:
        """Power-iteration estimates of the operators' norms in float64, for judging how tight the bounds are.

        Args: vectors: start vectors by operator name, such as those of training; random ones by default.
        """
        with float64_on_cpu():
            network = jax.tree.map(jnp.asarray, self.network)
            if vectors is None:
                vectors = bounds.init_vectors(network, jax.random.key(0))
            vectors = {name: jnp.asarray(_host_float64(v)) for name, v in vectors.items()}
            sigmas, _ = jax.jit(bounds.norm_estimates, static_argnums=2)(network, vectors, num_iters)
            return {name: float(sigma) for name, sigma in sigmas.items()}

    def _check_images(self, images) -> np.ndarray:
        images = np.asarray(images)
        shape = ", ".join(map(str, self.in_shape))
        if images.shape[1:] != self.in_shape:
            raise UserError(f"Expected images of shape (n, {shape}), got {images.shape}.")
        if not np.issubdtype(images.dtype, np.floating):
            raise UserError(f"Expected images as floats in [0, 1], got {images.dtype}: divide 8-bit images by 255.")
        images = images.astype(np.float64)
        if images.size and not (np.nanmin(images) >= 0 and np.nanmax(images) <= 1):
            low, high = np.nanmin(images), np.nanmax(images)
            raise UserError(f"Expected pixels in [0, 1], got values from {low:g} to {high:g}: rescale the images.")
        return images

    def _batches(self, images, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"Expected a batch_size of at least 1, got {batch_size}.")
        with float64_on_cpu():
            network = jax.tree.map(jnp.asarray, self.network)
            for start in range(0, len(images), batch_size):
                batch = images[start : start + batch_size]
                padding = [(0, batch_size - len(batch))] + [(0, 0)] * (images.ndim - 1)
                yield network, jnp.asarray(np.pad(batch, padding)), len(batch)

    def __call__(self, images, batch_size: int = 256) -> np.ndarray:
        """Logits (n, k) in float64 for pixels (n, *in_shape) in [0, 1]. Raises: UserError for other images."""
        images = self._check_images(images)
        out = [np.empty((0, self.num_classes))]
        out += [np.asarray(jax.jit(Network.__call__)(net, x))[:n] for net, x, n in self._batches(images, batch_size)]
        return np.concatenate(out)

    def margins(self, images, batch_size: int = 256) -> tuple[np.ndarray, np.ndarray]:
        """Predictions (n,) and lower bounds (n, k) of logit[prediction] - logit[i] in exact real arithmetic.

        The rounding error of the float64 evaluation is bounded for each image and subtracted.
        """
        images = self._check_images(images)
        norms = tuple(row.bound for row in self._bounds[1:])
        pairwise = self.network.head.pairwise_bound()
        predictions, lower = [np.empty(0, np.int64)], [np.empty((0, self.num_classes))]
        for network, x, n in self._batches(images, batch_size):
            logits, error, head_error = (np.asarray(a)[:n] for a in _evaluate(network, norms, x))
            predicted = np.argmax(logits, axis=1)
            own = np.take_along_axis
            gaps = own(logits, predicted[:, None], 1) - logits
            slack = pairwise[predicted] * error[:, None] + head_error + own(head_error, predicted[:, None], 1)
            slack = slack * (1 + operators.gamma(8)) + operators.gamma(2) * np.abs(gaps)
            predictions.append(predicted)
            lower.append(np.nextafter(gaps - slack, -np.inf))
        return np.concatenate(predictions), np.concatenate(lower)

    def certify(self, images, batch_size: int = 256) -> Certificate:
        """Proves, for each image, a radius inside which the class computed in exact arithmetic cannot change.

        Args: images: (n, *in_shape), floats in [0, 1]. NaN pixels give radius 0.
        Returns: Certificate; all rivals are checked; ties and what is not finite give radius 0.
        Raises: UserError for images of another shape, type or range; NotCertifiable if a layer has no proved bound.
        """
        return certify_margins(*self.margins(images, batch_size), self.margin_lipschitz())

    # ---- files -------------------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name: ops/<name>/<field>, head/<field>, input_mean, input_std."""
        found = {}
        for name, op in [*zip(self.network.names, self.network.ops, strict=True), (None, self.network.head)]:
            prefix = "head" if name is None else f"ops/{name}"
            for field in dataclasses.fields(op):
                value = getattr(op, field.name)
                if isinstance(value, np.ndarray):
                    found[f"{prefix}/{field.name}"] = np.ascontiguousarray(value)
        return {**found, "input_mean": self.network.input_mean, "input_std": self.network.input_std}

    def _layout(self) -> dict:
        ops = []
        for name, op in zip(self.network.names, self.network.ops, strict=True):
            static = {f.name: getattr(op, f.name) for f in dataclasses.fields(op)}
            static = {k: v for k, v in static.items() if not isinstance(v, np.ndarray)}
            ops.append({"name": name, "type": type(op).__name__, **static})
        return {"ops": ops, "head": type(self.network.head).__name__}

    def sha256(self) -> str:
        """Hash of the network: its layout and the bytes of its arrays, as 64 hexadecimal digits."""
        digest = hashlib.sha256(json.dumps(self._layout(), sort_keys=True).encode())
        for name, array in sorted(self.arrays().items()):
            little = array.astype("<f8")
            digest.update(f"\n{name} {list(array.shape)}\n".encode() + little.tobytes())
        return digest.hexdigest()

    def save(self, directory: str | os.PathLike) -> None:
        """Writes network.safetensors and, last, network.json with the hash of both; each file appears whole or not at all."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        target = directory / "network.safetensors"
        temporary = directory / f".network.{os.getpid()}.tmp"
        try:
            safetensors.numpy.save_file(self.arrays(), temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        document = {"format": FORMAT, "schema": SCHEMA, "sha256": self.sha256(), **self._layout()}
        write_json(directory / "network.json", document)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "FrozenNetwork":
        """Reads what `save` wrote.

        Raises: UserError if a file is missing, damaged, of another format or schema, or the hash does not fit.
        """
        directory = pathlib.Path(directory)
        try:
            document = json.loads((directory / "network.json").read_text())
            arrays = safetensors.numpy.load_file(directory / "network.safetensors")
        except FileNotFoundError as error:
            raise UserError(f"{directory} holds no frozen network: {error.filename} is missing.") from error
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise UserError(f"{directory}: the frozen network is damaged ({error}). Freeze it again.") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT or document.get("schema") != SCHEMA:
            raise UserError(f"{directory}/network.json is not of format {FORMAT!r}, schema {SCHEMA}: made by another version?")
        try:
            frozen = cls(_rebuild(document, arrays))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{directory}: layout and arrays do not fit each other ({error}).") from error
        if frozen.sha256() != document.get("sha256"):
            raise UserError(f"{directory}: the arrays do not have the recorded hash; a file was changed or damaged.")
        return frozen


def _rebuild(document: dict, arrays: dict[str, np.ndarray]) -> Network:
    def tuples(value):
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    ops = []
    for entry in document["ops"]:
        cls, prefix = _OPERATORS[entry["type"]], f"ops/{entry['name']}"
        fields = {f.name: entry.get(f.name, arrays.get(f"{prefix}/{f.name}")) for f in dataclasses.fields(cls)}
        ops.append(cls(**{name: tuples(value) for name, value in fields.items()}))
    if document["head"] != operators.LinearHead.__name__:
        raise ValueError(f"unknown head {document['head']!r}")
    head = operators.LinearHead(arrays["head/matrix"], arrays["head/bias"])
    names = tuple(entry["name"] for entry in document["ops"])
    return Network(tuple(ops), head, arrays["input_mean"], arrays["input_std"], names)
