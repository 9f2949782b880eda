"""Weights of the papers' PyTorch code as lipjax variables."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipjax import bounds
from lipjax.interop.bronet import bronet
from lipjax.interop.compared import compared
from lipjax.interop.crm import crm
from lipjax.interop.lipconvnet import improved, soc
from lipjax.interop.liresnet import liresnet
from lipjax.interop.onnx_graphs import from_onnx
from lipjax.interop.potentialnet import cpl, sll
from lipjax.interop.sandwichnet import lbdn
from lipjax.interop.sequential import from_sequential
from lipjax.interop.stagednet import orthogonium
from lipjax.nn import COLLECTION, LipschitzModel

# State of the original that has no counterpart here: of a curvature estimate, constants that are checked apart,
# identities, start vectors, and matrices that evaluation derived from the weights.
_LIPCONVNET = ("correction", "logits_layer._v", "shift", "scale")
_IGNORED = {
    **dict.fromkeys(("crm", "improved_l2", "soc"), _LIPCONVNET),
    "bronet": ("stem.0.init_x", "conv_1.init_x", "identity", "I_low", "I_full", "identity_half", "residual_identity"),
    "compared": ("u",),
    "cpl": ("eval_sv_max", "u", "alpha"),
    "liresnet": ("stem.0.init_x", "conv.init_x", "conv.identity", "linear.identity", "linear.eval_weight"),
}
_FAMILIES = {
    "bronet": bronet,
    "compared": compared,
    "cpl": cpl,
    "crm": crm,
    "improved_l2": improved,
    "lbdn": lbdn,
    "liresnet": liresnet,
    "orthogonium": orthogonium,
    "sll": sll,
    "soc": soc,
}


def from_torch(family: str, state_dict: dict[str, Any], **options) -> tuple[LipschitzModel, dict]:
    """The model and the variables that compute what a network of the papers' code computes.

    Args:
      family: "soc" (singlasahil14/SOC, arXiv:2108.04062) or "improved_l2" (singlasahil14/improved_l2_robustness,
        arXiv:2211.08453): the class LipConvNet of each; "crm" (o4lc/CRM-LipLT, arXiv:2310.00116): what its
        createNetwork makes of layers without batch normalisation; "liresnet" (hukkai/liresnet, arXiv:2310.02513):
        the class GloroNet with LiResConv, Map2Vec and LiResMLP; "bronet" (ntuaislab/BRONet, arXiv:2505.15174): the
        class BRONet with BRO backbones; "compared" (berndprach/1LipschitzLayersCompared, arXiv:2311.16833): the class
        SimplifiedConvNet; "sll" (araujoalexandre/Lipschitz-SLL-Networks, arXiv:2303.03169): LipschitzNetwork; "cpl"
        (MILES-PSL/Convex-Potential-Layer, arXiv:2110.12690): ConvexPotentialLayerNetwork with use_lln; "lbdn"
        (acfr/LBDN, arXiv:2301.11526): DNN with gamma 1; "orthogonium" (deel-ai/orthogonium, arXiv:2501.07930): what
        StagedCNN makes of AdaptiveOrthoConv2d, MaxMin, OrthoLinear and no pooling.
      state_dict: name -> array (anything that numpy.asarray takes), with the original's names and layouts. The
        original's state_dict() of "crm" networks has it under "original".
      options: the original constructor's arguments by name ("crm": the entries of networkConfiguration, of which
        layers, activation and inputShape are read; "liresnet": depth, width, input_size, num_classes and use_lln, and
        out_dim and mlp_depth, which are 2048 and 8 in the original; "compared": classes by name, get_conv="AOLConv2d";
        "orthogonium": norm by name, None or "BatchCentering", and kernel_size and padding_mode of the convolutions).
    Returns: (model, variables): model.apply(variables, x), x NHWC, gives the original's logits in eval mode for the
      same network input, and model.apply(variables, x, train=True) those in train mode. "soc" and "crm" networks have
      no input normalisation of their own: give the model input_mean and input_std (`model.clone`) to certify in pixel
      units. Start vectors of norm estimates are drawn afresh ("liresnet": init_x is not read). A Cayley network of
      "soc" whose kernels exceed their map computes with cropped kernels; the taps that it crops are zero here.
      Layers of "orthogonium" take three steps of their norm estimates whenever they compute, in eval mode too; ours
      in train mode alone, which shows only where Björck's steps have not converged.
    Raises: ValueError for an unknown family or option, and for missing, extra or misshapen arrays (naming the array and
      both shapes).
    Example: the weights of a network with one hidden layer, by their names in the code of CRM.
      >>> from lipjax import interop
      >>> layers = [["flatten"], ["linear", 4, 2], ["linear", 2, 2]]
      >>> state = {"linear.1.weight": np.ones((2, 4)), "linear.1.bias": np.zeros(2),
      ...          "linear.3.weight": np.eye(2), "linear.3.bias": np.zeros(2)}
      >>> model, variables = interop.from_torch("crm", state, layers=layers, inputShape=(1, 2, 2))
      >>> np.asarray(model.apply(variables, jnp.ones((1, 2, 2, 1)))).tolist()
      [[4.0, 4.0]]
    """
    if family not in _FAMILIES:
        raise ValueError(f"Expected a family of {sorted(_FAMILIES)}, got {family!r}.")
    model, entries = _FAMILIES[family](state_dict, options)
    model.check()
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *model.input_shape)))
    arrays = {name: np.asarray(value) for name, value in state_dict.items()}
    expected = {name for entry in entries for name in (entry.name, *entry.further)}
    unread = _IGNORED.get(family, ())
    ignored = {name for name in arrays if name in unread or name.rpartition(".")[2] in unread}
    missing, extra = sorted(expected - arrays.keys()), sorted(arrays.keys() - expected - ignored)
    if missing or extra:
        raise ValueError(f"The state dict of a {family!r} network lacks {missing or 'nothing'}, has extra {extra}.")
    variables = jax.tree.map(lambda leaf: None, dict(abstract))
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
        parent[entry.path[-1]] = jnp.asarray(entry.transform(array, *(arrays[name] for name in entry.further)))
        if parent[entry.path[-1]].shape != shape:
            raise ValueError(f"{entry.further}: expected shapes that fit {entry.name} of {shape}.")
    variables[COLLECTION]["vectors"] = {}
    for path, leaf in _leaves_with_none(variables):
        keys = [key.key for key in path]
        if leaf is None and keys[0] == COLLECTION and keys[-1] == "vector":  # where a layer's norm estimate starts
            v = jax.random.normal(jax.random.key(0), _at(abstract, keys).shape)
            _at(variables, keys[:-1])[keys[-1]] = v
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


__all__ = ["from_onnx", "from_sequential", "from_torch"]


def __dir__() -> list[str]:
    return __all__
