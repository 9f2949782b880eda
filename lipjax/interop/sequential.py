"""Networks from the layers that a PyTorch `nn.Sequential` holds, or from tuples that say the same."""

import dataclasses
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lipjax.errors import UserError
from lipjax.interop.assembly import ACTIVATIONS, Assembly
from lipjax.interop.comparison import compare_logits, compare_part
from lipjax.network import Network

_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer of a sequence: its name there, what it is called there, and the tuple that says what it is."""

    name: str
    title: str
    kind: str
    arrays: dict[str, Any]
    options: dict[str, Any]

    @property
    def label(self) -> str:
        return f"Layer {self.name} ({self.title})"


def _conv2d(assembly: Assembly, name: str, arrays: dict, options: dict) -> None:
    sides, padding = np.shape(arrays["weight"])[2:], options["padding"]
    steps, spread = (_pair(options[key], name, key, 1) for key in ("stride", "dilation"))
    window = [d * (k - 1) + 1 for k, d in zip(sides, spread, strict=True)]
    pads: Any
    if padding == "same":
        pads = tuple(((k - 1) // 2, k - 1 - (k - 1) // 2) for k in window)
    else:
        pads = tuple((n, n) for n in _pair(0 if padding == "valid" else padding, name, "padding", 0))
    mode = options["padding_mode"]
    if mode == "circular" and all(low == high == (k - 1) / 2 for k, (low, high) in zip(window, pads, strict=True)):
        pads = "CIRCULAR"
    elif mode != "zeros" and any(pair != (0, 0) for pair in pads):
        raise UserError(
            f"{name}: expected padding_mode 'zeros', or 'circular' with a padding of half an odd kernel, got {mode!r} "
            f"with padding {padding!r} of kernels {tuple(sides)}."
        )
    groups = {"groups": options["groups"], "dilation": spread}
    assembly.convolve(name, arrays["weight"], arrays["bias"], strides=steps, padding=pads, **groups)


def _linear(assembly: Assembly, name: str, arrays: dict, options: dict) -> None:
    assembly.dense(name, arrays["weight"], arrays["bias"])


def _flatten(assembly: Assembly, name: str, arrays: dict, options: dict) -> None:
    assembly.flatten(name, options["order"])


def _identity(assembly: Assembly, name: str, arrays: dict, options: dict) -> None:
    pass


def _maxmin(assembly: Assembly, name: str, arrays: dict, options: dict) -> None:
    pairs, first, places = options["pairs"], options["first"], assembly.places
    if pairs not in ("neighbours", "halves") or first not in ("max", "min"):
        raise UserError(
            f"{name}: expected pairs 'neighbours' or 'halves' and first 'max' or 'min', got {pairs!r} and {first!r}."
        )
    if len(places) % 2:
        raise UserError(f"{name}: expected an even number of channels to pair, got {len(places)}.")
    axis, shape = (1, [-1, 2]) if pairs == "neighbours" else (0, [2, -1])
    both = places.reshape(*shape, *places.shape[1:])
    one, other = (np.repeat(part, 2, axis).reshape(places.shape) for part in np.split(both, 2, axis))
    larger = np.zeros(both.shape, bool)
    np.moveaxis(larger, axis, 0)[0 if first == "max" else 1] = True
    assembly.sort_pairs(name, one, other, larger.reshape(places.shape))


def _avg_pool2d(assembly: Assembly, name: str, arrays: dict, options: dict) -> None:
    sides = _pair(options["kernel_size"], name, "kernel_size", 1)
    steps = sides if options["stride"] in (None, ()) else _pair(options["stride"], name, "stride", 1)
    pads = _pair(options["padding"], name, "padding", 0)
    if options["ceil_mode"] or (any(pads) and not options["count_include_pad"]):
        raise UserError(f"{name}: ceil_mode, and count_include_pad=False with a padding, are not supported.")
    assembly.average(name, sides, steps, ((pads[0], pads[0]), (pads[1], pads[1])))


def _adaptive_avg_pool2d(assembly: Assembly, name: str, arrays: dict, options: dict) -> None:
    size, wanted = assembly.places.shape[1:], options["output_size"]
    parts = (wanted, wanted) if np.ndim(wanted) == 0 else tuple(wanted)
    parts = [n if part is None else int(part) for n, part in zip(size, parts, strict=False)]
    if len(parts) != 2 or any(part < 1 or n % part for n, part in zip(size, parts, strict=True)):
        raise UserError(f"{name}: expected an output_size that divides the size {size}, got {wanted!r}.")
    sides = size[0] // parts[0], size[1] // parts[1]
    assembly.average(name, sides, sides, "VALID")


def _batch_norm(assembly: Assembly, name: str, arrays: dict, options: dict) -> None:
    mean, variance, scale, shift = (
        None if arrays[key] is None else _along_channels(assembly, arrays[key])
        for key in ("running_mean", "running_var", "weight", "bias")
    )
    factor = (1.0 if scale is None else scale) / np.sqrt(variance + options["eps"])
    assembly.affine(name, factor, (0.0 if shift is None else shift) - factor * mean)


def _normalize(assembly: Assembly, name: str, arrays: dict, options: dict) -> None:
    assembly.normalize(name, *(_along_channels(assembly, arrays[key]) for key in ("mean", "std")))


def _along_channels(assembly: Assembly, values) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return values.reshape(-1, *[1] * (assembly.places.ndim - 1)) if values.ndim == 1 else values


def _activation(kind: str) -> Callable[..., None]:
    def add(assembly: Assembly, name: str, arrays: dict, options: dict) -> None:
        assembly.activation(name, kind, **options)

    return add


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A kind of layer: what adds it; its arrays and options with their defaults, _REQUIRED where there is none."""

    add: Callable[[Assembly, str, dict, dict], None]
    arrays: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


_WEIGHTS = {"weight": _REQUIRED, "bias": None}
_STEPS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros"}
_POOL = {"kernel_size": _REQUIRED, "stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True}
_STATISTICS = {"running_mean": _REQUIRED, "running_var": _REQUIRED, "weight": None, "bias": None}
_KINDS = {
    "adaptive_avg_pool2d": _Kind(_adaptive_avg_pool2d, options={"output_size": _REQUIRED}),
    "avg_pool2d": _Kind(_avg_pool2d, options=_POOL),
    "batch_norm": _Kind(_batch_norm, _STATISTICS, {"eps": 1e-5}),
    "conv2d": _Kind(_conv2d, _WEIGHTS, _STEPS),
    "flatten": _Kind(_flatten, options={"order": "chw"}),
    "identity": _Kind(_identity),
    "linear": _Kind(_linear, _WEIGHTS),
    "maxmin": _Kind(_maxmin, options={"pairs": _REQUIRED, "first": _REQUIRED}),
    "normalize": _Kind(_normalize, {"mean": _REQUIRED, "std": _REQUIRED}),
    **{kind: _Kind(_activation(kind)) for kind in ACTIVATIONS if kind != "leaky_relu"},
    "leaky_relu": _Kind(_activation("leaky_relu"), options={"negative_slope": 0.01}),
}
# Modules by the name of their class: the kind, and what attributes must be, since otherwise they compute another thing.
_EVAL = {"training": (False,)}
_SORT = {"axis": (1,), "_coefficient_lip": (1,)}  # of orthogonium's axis of channels, and torchlip's factor
_MODULES: dict[str, tuple[str, dict[str, tuple]]] = {
    "AdaptiveAvgPool2d": ("adaptive_avg_pool2d", {}),
    "AvgPool2d": ("avg_pool2d", {"divisor_override": (None,)}),
    "BatchNorm1d": ("batch_norm", _EVAL),
    "BatchNorm2d": ("batch_norm", _EVAL),
    "Conv2d": ("conv2d", {}),
    "Dropout": ("identity", _EVAL),
    "Dropout1d": ("identity", _EVAL),
    "Dropout2d": ("identity", _EVAL),
    "Flatten": ("flatten", {"start_dim": (1,), "end_dim": (-1,)}),
    "GroupSort": ("maxmin", {"group_size": (2,), **_SORT}),
    "GroupSort2": ("maxmin", {"group_size": (2,), **_SORT}),
    "Identity": ("identity", {}),
    "LeakyReLU": ("leaky_relu", {}),
    "Linear": ("linear", {}),
    "MaxMin": ("maxmin", _SORT),
    "Normalize": ("normalize", {}),
    "ReLU": ("relu", {}),
    "Sigmoid": ("sigmoid", {}),
    "Tanh": ("tanh", {}),
}
# What sorting modules do that do not say it themselves: of torchlip, and of orthogonium.
_SORTS = {
    "GroupSort": {"pairs": "neighbours", "first": "min"},
    "GroupSort2": {"pairs": "neighbours", "first": "min"},
}
# Methods of PyTorch's modules that say what they compute.
_COMPUTE = ("forward", "_conv_forward", "__call__", "_call_impl", "_wrapped_call_impl")
_ORTHOGONIUM = {"MaxMin": {"pairs": "halves", "first": "max"}}


def _pair(value, name: str, label: str, least: int) -> tuple[int, int]:
    try:
        pair = (value, value) if np.ndim(value) == 0 else tuple(value)
        if len(pair) == 2 and all(int(n) == n and n >= least for n in pair):
            return int(pair[0]), int(pair[1])
    except (TypeError, ValueError):
        pass
    raise UserError(f"{name}: expected {label} as one or two whole numbers of at least {least}, got {value!r}.")


def _array(value) -> Any:
    """An array as NumPy's; a tensor of PyTorch in float64, which holds its numbers."""
    if hasattr(value, "detach"):
        return value.detach().cpu().double().numpy()
    return None if value is None else np.asarray(value)


def _layers_of(layers: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and layers of a sequence, those of sequences in it included. Raises: UserError for what is no sequence."""
    title, base = type(layers).__name__, _base(layers, ("Sequential",))
    if base is None and not isinstance(layers, list | tuple):
        raise UserError(
            f"Expected an nn.Sequential, or a list of layers, got a {title}: a module of another class may compute "
            "anything of its children. List its layers in the order in which its forward calls them."
        )
    if base is not None:
        _check_forward(f"{prefix.rstrip('.') or 'The network'} ({title})", layers, base)
    # Not named_children(), which leaves out a module that stands there a second time.
    for name, layer in enumerate(layers) if base is None else vars(layers)["_modules"].items():
        if isinstance(layer, list) or _base(layer, ("Sequential",)) is not None:
            yield from _layers_of(layer, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", layer


def _base(layer, names) -> type | None:
    """The class of these names that an object is of: the most basic one, since a subclass may have its name."""
    return next((cls for cls in reversed(type(layer).__mro__) if cls.__name__ in names), None)


def _check_forward(label: str, layer, base: type) -> None:
    """Raises: UserError if a module may compute something else than modules of the class it derives from."""
    for method in _COMPUTE:
        own, theirs = (inspect.getattr_static(cls, method, None) for cls in (type(layer), base))
        if method in getattr(layer, "__dict__", ()) or own is not theirs:
            raise UserError(
                f"{label} computes something of its own, since it overrides {method} of {base.__name__}: export it to "
                "plain layers, or put a tuple (kind, arrays, options) that says what it computes in its place."
            )
    if getattr(layer, "_forward_hooks", None) or getattr(layer, "_forward_pre_hooks", None):
        raise UserError(f"{label} has hooks, which may change what it computes: remove them first.")


def _read(name: str, layer) -> _Layer:
    """A tuple, or a module by the name of its class, as a layer. Raises: UserError naming what is not supported."""
    if isinstance(layer, tuple):
        kind, arrays, options, *more = (*layer, {}, {})[: max(3, len(layer))]
        if more or not isinstance(kind, str) or not isinstance(arrays, dict) or not isinstance(options, dict):
            raise UserError(
                f"Layer {name}: expected (kind, arrays, options), the latter two by name, got {layer!r:.200}."
            )
        return _Layer(name, kind, kind, arrays, options)
    title = type(layer).__name__
    base = _base(layer, _MODULES)
    if base is None:
        raise UserError(
            f"Layer {name} ({title}) is not supported: expected modules of {sorted(_MODULES)}, or tuples (kind, "
            f"arrays, options) of {sorted(_KINDS)}."
        )
    _check_forward(f"Layer {name} ({title})", layer, base)
    kind, fixed = _MODULES[base.__name__]
    for attribute, values in fixed.items():
        if hasattr(layer, attribute) and getattr(layer, attribute) not in values:
            what = f"{attribute}={values[0]}, got {getattr(layer, attribute)!r}"
            raise UserError(f"Layer {name} ({title}): expected {what}" + (": call eval()." if fixed is _EVAL else "."))
    known = _KINDS[kind]
    options = {key: getattr(layer, key, default) for key, default in known.options.items()}
    if kind == "maxmin":
        told = _ORTHOGONIUM if type(layer).__module__.partition(".")[0] == "orthogonium" else _SORTS
        options = {**told.get(base.__name__, {}), **{k: v for k, v in options.items() if v is not _REQUIRED}}
    return _Layer(name, title, kind, {key: _array(getattr(layer, key, None)) for key in known.arrays}, options)


def _complete(layer: _Layer) -> tuple[dict, dict]:
    """Arrays and options with their defaults. Raises: UserError for unknown or missing ones."""
    if layer.kind not in _KINDS:
        raise UserError(f"{layer.label} is not supported: expected one of {sorted(_KINDS)}.")
    found = []
    for what, given in (("arrays", layer.arrays), ("options", layer.options)):
        known: dict[str, Any] = getattr(_KINDS[layer.kind], what)
        full = {**known, **given}
        missing = [key for key in known if full[key] is _REQUIRED or (known[key] is _REQUIRED and full[key] is None)]
        unknown = sorted(set(given) - set(known))
        if missing or unknown:
            raise UserError(
                f"{layer.label} has the {what} {sorted(known)}: {missing or 'none'} missing, {unknown or 'none'} "
                "unknown. (Of a module they are attributes of these names.)"
            )
        found.append(full)
    return found[0], found[1]


def from_sequential(
    layers, input_shape: tuple[int, ...] | None = None, *, input_mean=0.0, input_std=1.0, compare: bool = True
) -> Network:
    """The network that the layers of a PyTorch `nn.Sequential` compute, in eval mode.

    Args:
      layers: an `nn.Sequential`, or a sequence of its modules, or of tuples (kind, arrays, options) that say what they
        are, the latter two by name. The kinds, of PyTorch's options and layouts: "conv2d" (weight OIHW, bias; stride,
        padding, dilation, groups, padding_mode), "linear" (weight (out, in), bias), "flatten" (order="chw", or "hwc"
        for what another framework flattened), "relu", "leaky_relu" (negative_slope), "tanh", "sigmoid", "maxmin"
        (pairs="neighbours": channels or units 2i, 2i + 1; or "halves": i, i + c / 2; first="max" or "min"),
        "avg_pool2d", "adaptive_avg_pool2d", "batch_norm" (running_mean, running_var, weight, bias; eps), "normalize"
        (mean, std), "identity". Modules are known by the name of their class, and must not override its forward; of
        GroupSort2 the order is torchlip's, and of other sorting modules what their attributes `pairs` and `first` say.
      input_shape: of one image there, (channels, height, width), or (features,). Not needed if a Linear comes first.
      input_mean, input_std: what is done to pixels in [0, 1] before the first layer: numbers, or one for each channel.
      compare: run PyTorch's modules on some random images, and raise where logits differ. Where tuples stand among
        them, modules that follow each other are compared by themselves; what a tuple says is taken for true.
    Returns: a Network of float64 arrays that takes images (b, height, width, channels), pixels in [0, 1];
      `lipjax.freeze` takes it. Weights stay what they are, but for batch normalisation and averages, which round.
    Raises: UserError naming the layer for what is not supported or does not fit.
    Example: two units, sorted; the network below has them in another order and gives the same logits.
      >>> from lipjax import interop
      >>> arrays = {"weight": np.eye(4)}
      >>> sort = ("maxmin", {}, {"pairs": "neighbours", "first": "min"})
      >>> network = interop.from_sequential([("linear", arrays), sort])
      >>> lipjax.freeze(network)(np.array([[0.4, 0.3, 0.1, 0.2]])).tolist()
      [[0.3, 0.4, 0.1, 0.2]]
    """
    found = [_read(name, layer) for name, layer in _layers_of(layers)]
    if input_shape is None:
        first = next((layer for layer in found if layer.kind != "identity"), None)
        weight: Any = None if first is None or first.kind != "linear" else first.arrays.get("weight")
        if len(np.shape(weight)) != 2:
            raise UserError(
                "Expected an input_shape, (channels, height, width) of one image or (features,), where no linear layer "
                "comes first."
            )
        input_shape = (np.shape(weight)[1],)
    assembly = Assembly(input_shape, input_mean, input_std)
    shapes = []
    for layer in found:
        shapes.append(assembly.places.shape)
        _add(assembly, layer)
    network = assembly.finish()
    torch: Any = sys.modules.get("torch")
    modules = [layer for _, layer in _layers_of(layers)]
    if compare and torch is not None and all(isinstance(module, torch.nn.Module) for module in modules):
        whole = [layers] if isinstance(layers, torch.nn.Module) else modules
        compare_logits(network, input_shape, (input_mean, input_std), lambda x: _run(torch, whole, x), "the modules")
    elif compare and torch is not None:
        _compare_parts(torch, found, modules, shapes)
    return network


def _add(assembly: Assembly, layer: _Layer) -> None:
    arrays, options = _complete(layer)
    name = f"{layer.name}_{layer.title}"
    try:
        _KINDS[layer.kind].add(assembly, name, arrays, options)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{name}: {error}") from error


def _compare_parts(torch, layers: list[_Layer], modules: list, shapes: list[tuple[int, ...]]) -> None:
    """Compares modules between tuples. modules: and tuples, by layer. shapes: of what each layer takes."""
    are = [isinstance(module, torch.nn.Module) for module in modules]
    for compared, group in itertools.groupby(range(len(layers)), are.__getitem__):
        if compared:
            places = list(group)
            first, last = places[0], places[-1]
            part = Assembly(shapes[first])
            for i in places:
                _add(part, layers[i])
            run = functools.partial(_run, torch, modules[first : last + 1])
            compare_part(part, shapes[first], run, f"the modules {layers[first].name} to {layers[last].name}")


def _run(torch, modules, x: np.ndarray) -> np.ndarray:
    """The logits of modules for inputs as they expect them."""
    held = next((tensor for module in modules for tensor in module.parameters()), None)
    tensor = torch.from_numpy(x) if held is None else torch.from_numpy(x).to(device=held.device, dtype=held.dtype)
    with torch.no_grad():
        for module in modules:
            tensor = module(tensor)
    return _array(tensor)
