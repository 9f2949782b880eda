"""Networks as functions of images, whose gradients run through the adjoints of linear operators.

XLA puts the operands of convolutions in the order that its fast code for CPUs wants in a program's outermost
computation alone (JAX 0.10.2). Inside a loop the convolutions that automatic differentiation makes for a gradient to
images keep an order for which there is only slow code; `Linear.adjoint` asks for the fast one from the start.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lipjax.network import Network
from lipjax.operators import Residual
from lipjax.operators._base import Linear


@jax.custom_vjp
def _linear(op, x):
    return op(x)


def _forward(op, x):
    return op(x), op


def _backward(op, g):
    return jax.tree.map(jnp.zeros_like, op), op.adjoint(g)


_linear.defvjp(_forward, _backward)


def _through(op, x):
    if isinstance(op, Residual):
        y = x
        for part in op.ops:
            y = _through(part, y)
        return x + y
    return _linear(op, x) if isinstance(op, Linear) else op(x)


def of_images(network: Callable) -> Callable:
    """The same function of images, in which the network is a constant under differentiation; reverse mode only.

    What is no `Network` is returned as it is.
    """
    if not isinstance(network, Network):
        return network
    network = jax.lax.stop_gradient(network)

    def logits(x):
        if x.shape[1:] != network.in_shape:
            return network(x)  # which says what is wrong
        x = network.normalize(x)
        for op in network.ops:
            x = _through(op, x)
        return network.head(x)

    return logits
