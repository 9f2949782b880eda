"""The work of one device in a compiled program, read from its text: products, convolutions, collectives, kernels."""

import collections
import dataclasses
import math
import re

from lipjax.plan.flops import kind_of, window_pairs

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_SIZES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_ALGORITHMS = {"tf32_tf32_f32_x3": "tf32x3", "bf16_bf16_f32_x6": "bfloat16x6"}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
# Calls of cuDNN and cuBLAS, and instructions for which a GPU starts nothing.
_LIBRARY = re.compile(r'custom_call_target="(__cudnn\$conv\w+|__cublas\$[\w$]+)"')
_NO_KERNEL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "opt-barrier"),
    *("while", "conditional", "call", "async-start", "async-update", "partition-id", "replica-id"),
}
_HOST = {"infeed", "outfeed", "send", "recv"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a compiled program.

    Attributes:
      kind: one of COLLECTIVES. group: devices that it joins. times: how often a device executes it in one run.
      bytes: the whole array that it is about, the results of one execution (of reduce-scatter: the operands).
    """

    kind: str
    group: int
    bytes: int
    times: int

    def link_bytes(self, reduces_in_network: bool = False) -> float:
        """Bytes that a device has to send or to receive, whichever is more, in all executions: the least possible.

        In a group of n, each device keeps its own n-th part. An all-reduce is a reduce-scatter and an all-gather,
        unless the network itself adds up.
        """
        share = (self.group - 1) / self.group
        if self.kind in ("collective-permute", "collective-broadcast"):
            share = float(self.group > 1)
        elif self.kind == "all-reduce" and not reduces_in_network:
            share *= 2
        return self.times * self.bytes * share


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. shape: of the result, as written; rest: from the operands on."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest[: _closing(self.rest) + 1])

    @property
    def library(self) -> str:
        """The function of cuDNN or cuBLAS that computes a product or convolution, or ""."""
        found = _LIBRARY.search(self.rest) if self.opcode == "custom-call" else None
        return found[1] if found else ""


class Program:
    """The text of a compiled program (`jax.stages.Compiled.as_text`), as computations that call each other.

    Attributes: num_devices: that run it together. unknown_loops: loops whose length the text does not give, which count
      once.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry, current = "", None
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif current is not None and (found := _INSTRUCTION.match(line)):
                current.append(_instruction(found[1], found[2]))
        header = text[: text.find("\n")]
        counts = [re.search(rf"\b{name}=(\d+)", header) for name in ("replica_count", "num_partitions")]
        self.num_devices = math.prod(int(found[1]) for found in counts if found)
        self.unknown_loops = 0
        self.times: dict[str, int] = collections.Counter()
        self._fused: set[str] = set()
        if self.entry:
            self._run(self.entry, 1)

    def _run(self, name: str, times: int) -> None:
        self.times[name] += times
        for instruction in self.computations.get(name, ()):
            repeats = times
            if instruction.opcode == "while":
                length = self._length(instruction)
                self.unknown_loops += length is None
                repeats *= 1 if length is None else length
            for _, called in _CALLED.findall(instruction.rest):
                for callee in called.strip("{}").split(","):
                    callee = callee.strip(" %")
                    if callee in self.computations:
                        if instruction.opcode == "fusion" or name in self._fused:
                            self._fused.add(callee)
                        self._run(callee, repeats)

    def _length(self, loop: Instruction) -> int | None:
        """Number of times that a loop runs: as stated, or the limit of its condition: JAX's loops count from 0 by 1."""
        if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(stated[1])
        condition = re.search(r"\bcondition=%?([\w.-]+)", loop.rest)
        lines = {i.name: i for i in self.computations.get(condition[1], ())} if condition else {}
        compared = [i for i in lines.values() if i.opcode == "compare" and "direction=LT" in i.rest]
        if len(compared) != 1 or len(compared[0].operands) != 2:
            return None
        limit = lines.get(compared[0].operands[1])
        found = re.match(r"\((\d+)\)", limit.rest) if limit is not None and limit.opcode == "constant" else None
        return int(found[1]) if found else None

    def _executed(self):
        for name, times in self.times.items():
            for instruction in self.computations[name]:
                yield name, instruction, times

    def collectives(self) -> list[Collective]:
        """Every collective operation in the program that joins more than one device.

        Programs for TPUs write an asynchronous one into the fusion that starts it, into each that goes on beside it and
        into the one that ends it: one channel, shape and place in the source. What goes on may be in a loop whose
        turns all carry the same one along, so that it is executed as often as the rarest of them. A channel alone does
        not tell: those inside `shard_map` all have the same on CPUs. They write a reduce-scatter as a fusion of an
        all-reduce and the slice of it that a device keeps.
        """
        found: dict[tuple, Collective] = {}
        for computation, instruction, times in self._executed():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            shape = instruction.shape
            if instruction.opcode != kind and kind != "all-reduce":
                shape = _elements(shape)[1]  # (operands, results, ...)
            group = _group(kind, instruction.rest, self.num_devices)
            size = _bytes(shape) * (group if kind == "reduce-scatter" else 1)
            if kind == "all-reduce" and computation in self._fused and self._only_sliced(computation, instruction.name):
                kind = "reduce-scatter"
            channel = re.search(r"\bchannel_id=(\d+)", instruction.rest)
            source = re.search(r'\bop_name="([^"]*)"', instruction.rest)
            key = (kind, instruction.name)
            if channel and computation in self._fused:
                key = (kind, channel[1], re.sub(r"\{[^}]*\}", "", instruction.shape), source[1] if source else "")
            if group > 1 and (key not in found or found[key].times > times):
                found[key] = Collective(kind, group, size, times)
        return list(found.values())

    def _only_sliced(self, computation: str, name: str) -> bool:
        readers = [i.opcode for i in self.computations[computation] if name in i.operands]
        return readers == ["dynamic-slice"]

    def flops(self) -> dict[str, float]:
        """Floating-point operations of one device in products and convolutions, by `flops.KINDS`.

        Those of cuDNN and cuBLAS are of the kind "library": a call of cuDNN does not say how precise it is.
        """
        totals: dict[str, float] = collections.defaultdict(float)
        shapes: dict[str, dict[str, str]] = {}
        for name, instruction, times in self._executed():
            library = instruction.library
            if instruction.opcode not in ("dot", "convolution") and not library:
                continue
            known = shapes.setdefault(name, {i.name: i.shape for i in self.computations[name]})
            left, right = (_array(known[operand]) for operand in instruction.operands[:2])
            out = _array(instruction.shape)
            if library.startswith("__cudnn$convBackward"):  # written with the window of the forward convolution
                left, right, out = (left, out, right) if library.endswith("Filter") else (out, right, left)
            count = _convolution if "conv" in (instruction.opcode + library) else _dot
            multiplications = count(instruction, left[1], right[1], out[1])
            is_complex = left[0].startswith("c")
            itemsize = max(_SIZES.get(dtype, 1) for dtype, _ in (left, right)) // (2 if is_complex else 1)
            kind = "library" if library else _kind(instruction.rest, itemsize)
            totals[kind] += 2.0 * times * multiplications * (4 if is_complex else 1)
        return dict(totals)

    def kernels(self) -> dict[str, int]:
        """Kernels that a GPU starts at least in one run: "library" calls, "triton" products, "collective", "other".

        A call of a library may start several; copies count as one each.
        """
        totals: dict[str, int] = collections.Counter()
        started: dict[str, int] = {}

        def walk(name: str, times: int) -> None:
            started[name] = started.get(name, 0) + times
            for i in self.computations.get(name, ()):
                if i.opcode in ("while", "conditional", "call", "async-start"):
                    repeats = times * ((self._length(i) or 1) if i.opcode == "while" else 1)
                    for _, called in _CALLED.findall(i.rest):
                        for callee in called.strip("{}").split(","):
                            walk(callee.strip(" %"), repeats)

        walk(self.entry, 1)
        for name, times in started.items():
            for i in self.computations.get(name, ()):
                if i.opcode in _NO_KERNEL or i.opcode.endswith("-done"):
                    continue
                kind = "other"
                if i.opcode.removesuffix("-start") in COLLECTIVES:
                    kind = "collective"
                elif i.opcode == "custom-call":
                    kind = "library"
                elif i.opcode == "fusion" and "__triton" in i.rest:
                    kind = "triton"
                totals[kind] += times
        return dict(totals)

    def unwanted(self) -> list[str]:
        """Things that a step on accelerators should not do and does: float64, Fourier transforms, calls of the host."""
        found = set()
        for name in self.times:
            for i in self.computations[name]:
                if re.search(r"\b(f64|c128)\[", i.shape):
                    found.add("float64")
                if i.opcode == "fft" or "fft" in "".join(re.findall(r'custom_call_target="([^"]*)"', i.rest)).lower():
                    found.add("a Fourier transform")
                if i.opcode in _HOST or re.search(r'custom_call_target="[^"]*callback', i.rest):
                    found.add("a call of the host")
        return sorted(found)


def _kind(attributes: str, itemsize: int) -> str:
    """One of KINDS, by the attributes of a product whose operands have at most so many bytes a number."""
    algorithm = re.search(r"algorithm=dot_(\w+)", attributes)
    if algorithm and algorithm[1] in _ALGORITHMS:
        return _ALGORITHMS[algorithm[1]]
    asked = re.search(r"operand_precision=\{(\w+),(\w+)\}", attributes)
    if itemsize <= 2 or asked is None:
        return kind_of(itemsize, None)
    return next((kind for kind in ("highest", "high") if kind in asked.groups()), "default")


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text) + 1 if text.startswith("(") else text.find(" ")
    opcode, _, _ = text[end:].strip().partition("(")
    return Instruction(name, text[:end], opcode, text[end:].strip()[len(opcode) :])


def _closing(text: str) -> int:
    """The place at which the parenthesis closes that opens a text."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return position
    return len(text) - 1


def _elements(shape: str) -> list[str]:
    """The elements of a tuple's shape."""
    found, depth, start = [], 0, 1
    for position, character in enumerate(shape):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 1 or depth == 0:
            found.append(shape[start:position])
            start = position + 1
    return found


def _array(shape: str) -> tuple[str, list[int]]:
    found = _ARRAY.search(shape)
    if found is None:
        raise ValueError(f"Expected the shape of an array, got {shape!r}.")
    return found[1], [int(n) for n in found[2].split(",") if n]


def _bytes(shape: str) -> int:
    """Bytes of all arrays in a shape. Of types that are not listed (u8, s32, f8e4m3) the first number is their bits."""
    total = 0
    for dtype, sides in _ARRAY.findall(shape):
        bits = re.search(r"\d+", dtype)
        size = _SIZES.get(dtype) if dtype in _SIZES or bits is None else max(int(bits[0]) // 8, 1)
        total += (size or 0) * math.prod(int(n) for n in sides.split(",") if n)
    return total


def _group(kind: str, rest: str, num_devices: int) -> int:
    """The number of devices that take part together: replica_groups as lists, as an iota, or as axes of a mesh."""
    if kind == "collective-permute":
        return 2 if re.search(r"source_target_pairs=\{\{", rest) else 1
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
        parts = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", found[2])  # 'axis' or, of an axis, 'axis':(before)size
        return math.prod(int(size or sizes[axis]) for axis, size in parts)
    return num_devices


def _dot(instruction: Instruction, left, right, out) -> int:
    found = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)[\]}]', instruction.rest)  # cuBLAS: in JSON
    contracted = [int(axis.strip('"')) for axis in found[1].split(",") if axis] if found else []
    return math.prod(left[axis] for axis in contracted) * math.prod(out)


def _convolution(instruction: Instruction, left, right, out) -> int:
    numbers = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if numbers is None:
        raise ValueError(f"Expected a convolution with dim_labels, got {instruction.rest!r}.")
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    axes = sorted(set(numbers[3]) & set("0123456789"))

    def per_axis(field: str, default: str) -> list[str]:
        return fields[field].split("x") if field in fields else [default] * len(axes)

    strides, pads = per_axis("stride", "1"), per_axis("pad", "0_0")
    dilations = per_axis("lhs_dilate", "1"), per_axis("rhs_dilate", "1")
    pairs = math.prod(
        window_pairs(
            left[numbers[1].index(axis)],
            right[numbers[2].index(axis)],
            out[numbers[3].index(axis)],
            int(strides[i]),
            int(pads[i].split("_")[0]),
            int(dilations[0][i]),
            int(dilations[1][i]),
        )
        for i, axis in enumerate(axes)
    )
    return pairs * out[numbers[3].index("b")] * out[numbers[3].index("f")] * right[numbers[2].index("i")]
