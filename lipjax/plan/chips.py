"""Published peak figures of accelerators, and the names of topologies made of them."""

import dataclasses
import math
import re

from lipjax.errors import UserError

_TPU = "Google Cloud documentation"
_NVIDIA = "NVIDIA data sheet"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip.

    Attributes:
      source: the vendor's document. memory: bytes of HBM. bandwidth: of HBM, bytes/s.
      links: bytes/s that a chip sends over all its links to other chips at once (half of what is published as
        bidirectional bandwidth).
      flops: floating-point operations/s of dense products, by `_flops.KINDS`.
      chips_per_host: in slices of several hosts.
      reduces_in_network: whether switches add up what chips send, so that an all-reduce sends every number once.
    """

    name: str
    source: str
    memory: float
    bandwidth: float
    links: float
    flops: dict[str, float]
    chips_per_host: int
    reduces_in_network: bool = False


def _tpu(name: str, source: str, teraflops: float, gib: float, gbps: float, gbits: float) -> Chip:
    # A TPU multiplies bfloat16 numbers. JAX makes a float32 product of one of these ("default"), of three ("high") or
    # of six ("highest").
    bfloat16 = teraflops * 1e12
    flops = {"bfloat16": bfloat16, "default": bfloat16, "high": bfloat16 / 3, "highest": bfloat16 / 6}
    flops |= dict.fromkeys(("tf32x3", "bfloat16x6"), flops["highest"])  # config.build_precision is for GPUs
    return Chip(name, f"{_TPU}: {source}", gib * 2**30, gbps * 1e9, gbits * 1e9 / 8, flops, chips_per_host=4)


def _hopper(name: str, source: str, gigabytes: float, terabytes: float) -> Chip:
    # Dense figures: the data sheets print those with sparsity, which are twice as high. Products of float32 numbers run
    # on tensor cores as TF32 unless "highest", which is float32 proper. NVLink: 900 GB/s in both directions together.
    flops = {"bfloat16": 989.5e12, "default": 494.5e12, "high": 494.5e12, "highest": 67e12}
    flops |= {"tf32x3": flops["default"] / 3, "bfloat16x6": flops["bfloat16"] / 6}
    return Chip(
        name, f"{_NVIDIA}: {source}", gigabytes * 1e9, terabytes * 1e12, 450e9, flops, 8, reduces_in_network=True
    )


# TPU pages as read in 2026: peak compute (bf16), HBM capacity and bandwidth, inter-chip interconnect bandwidth per
# chip, which the pages call 1600 Gbps or, both directions together, 400 GBps, for v5e.
CHIPS = {
    "v4": _tpu("TPU v4", "TPU v4, key specifications", 275.0, 32.0, 1200.0, 2400.0),
    "v5e": _tpu("TPU v5e", "TPU v5e, key chip specifications", 197.0, 16.0, 819.0, 1600.0),
    "v5p": _tpu("TPU v5p", "TPU v5p, key specifications", 459.0, 95.0, 2765.0, 4800.0),
    "v6e": _tpu(
        "TPU v6e", "TPU v6e, key specifications (the higher of two published sets)", 918.0, 32.0, 1640.0, 3584.0
    ),
    "h100": _hopper("H100 SXM", "H100 Tensor Core GPU, H100 SXM", 80.0, 3.35),
    "h200": _hopper("H200 SXM", "H200 Tensor Core GPU, H200 SXM", 141.0, 4.8),
}
TPUS = ("v4", "v5e", "v5p", "v6e")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips to plan for. name: as given; chip: None for processor cores, of which nothing is published here."""

    name: str
    chip: Chip | None
    count: int
    is_tpu: bool


def parse_topology(name: str) -> Topology:
    """The topology of a name such as v5e:16x16, h200:8 or cpu:8.

    Raises: UserError for any other name.
    """
    kind, _, shape = name.partition(":")
    kind = kind.lower()
    sides = [int(side) for side in shape.split("x")] if re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5}){0,2}", shape) else []
    dimensions = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2, "h100": 1, "h200": 1, "cpu": 1}.get(kind)
    if len(sides) != dimensions:
        raise UserError(
            f"--topology: expected a chip and a shape, such as v5e:16x16, v6e:4x4, v4:4x4x4, v5p:2x2x4, h100:8, h200:8 "
            f"or cpu:8; got {name!r}."
        )
    return Topology(name, CHIPS.get(kind), math.prod(sides), kind in TPUS)
