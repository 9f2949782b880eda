"""`freeze`: from a model and its variables, or a network, to a `FrozenNetwork`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lipjax.certify.float64 import float64_on_cpu, host_float64
from lipjax.certify.frozen import FrozenNetwork
from lipjax.certify.layout import rounded
from lipjax.network import Network
from lipjax.spectral.arithmetic import exact_float64


def freeze(model, variables=None, class_names: Sequence[str] | None = None, dtype: str = "float64") -> FrozenNetwork:
    """Builds the model's network in float64 and takes it to the host; or takes a network as it is.

    Args:
      model: has `apply(variables, method="build")` that returns a Network, such as any model of lipjax.models; or a
        `Network`, of NumPy or JAX arrays of any type whose numbers float64 holds, whatever jax_enable_x64 says.
      variables: the model's parameters and state, on any device and in any float type; none beside a network.
      class_names: as `FrozenNetwork` keeps them.
      dtype: "float32" rounds every array to float32 numbers before anything is proved, so that files are half as large.
        What is certified is the rounded network: its layers that were orthogonal have norms of 1 + 1e-7 or so.
    Returns: FrozenNetwork, the object that a certificate is about.
    Raises: ValueError if an array of the result is not finite or not float64, or names do not fit the classes;
      NotCertifiable naming an array of a network that float64 does not hold.
    Example:
      >>> head = lipjax.operators.LinearHead(np.eye(2), np.zeros(2))
      >>> lipjax.freeze(lipjax.network.make_network([("dense", lipjax.operators.Dense(np.eye(2)))], head)).num_classes
      2
    """
    if isinstance(model, Network):
        if variables is not None:
            raise ValueError("A network holds its arrays: freeze(network) takes no variables beside it.")
        return _frozen(jax.tree_util.tree_map_with_path(_exact_leaf, model), class_names, dtype)
    if variables is None:
        raise ValueError(
            f"freeze({type(model).__name__}, variables) takes the model's variables, too: model.init(...), or "
            "lipjax.training.load_trained(workdir), gives them."
        )
    variables = jax.tree.map(host_float64, variables)
    with float64_on_cpu():
        # In one program: operation by operation a deep network would compile for minutes.
        network = jax.jit(lambda v: model.apply(v, method="build"))(jax.tree.map(jnp.asarray, variables))
        return _frozen(jax.tree.map(np.asarray, network), class_names, dtype)


def _frozen(network: Network, class_names: Sequence[str] | None, dtype: str) -> FrozenNetwork:
    return FrozenNetwork(jax.tree.map(rounded, network) if dtype == "float32" else network, class_names, dtype)


def _exact_leaf(path, leaf) -> np.ndarray:
    return exact_float64(leaf, f"network{jax.tree_util.keystr(path)}")
