"""Networks as functions of images, whose gradients run through the adjoints of linear operators.

XLA puts the operands of convolutions in the order that its fast code for CPUs wants in a program's outermost
computation alone (JAX 0.10.2). Inside a loop the convolutions that automatic differentiation makes for a gradient to
images keep an order for which there is only slow code; `Linear.adjoint` asks for the fast one from the start.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lipjax.network import Network
from lipjax.operators import Composite, Linear, Operator, operator


@jax.custom_vjp
def _apply(op, x):
    return op(x)


def _forward(op, x):
    return op(x), op


def _backward(op, g):
    return jax.tree.map(jnp.zeros_like, op), op.adjoint(g)


_apply.defvjp(_forward, _backward)


@operator("op", static=())
class _ByAdjoint(Operator):
    """A linear operator as a constant under differentiation."""

    op: Any

    @property
    def in_shape(self):
        return self.op.in_shape

    @property
    def out_shape(self):
        return self.op.out_shape

    def __call__(self, x):
        return _apply(self.op, x)


def _by_adjoint(op):
    if isinstance(op, Composite):
        return op.with_parts(tuple(map(_by_adjoint, op.parts())))
    return _ByAdjoint(op) if isinstance(op, Linear) else op


def of_images(network: Callable) -> Callable:
    """The same function of images, in which the network is a constant under differentiation; reverse mode only.

    What is no `Network` is returned as it is.
    """
    if not isinstance(network, Network):
        return network
    network = jax.lax.stop_gradient(network)
    return dataclasses.replace(network, ops=tuple(map(_by_adjoint, network.ops)))
