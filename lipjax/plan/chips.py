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
      flops: floating-point operations/s of dense products, by `flops.KINDS`.
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


def _gpu(name: str, gigabytes: float, terabytes: float, nvlink: float, teraflops: tuple[float, float, float]) -> Chip:
    # teraflops: bfloat16, TF32, float32. Dense figures: most of the data sheets print those with sparsity, which are
    # twice as high. Products of float32 numbers run on tensor cores as TF32 unless "highest", which is float32 proper.
    # nvlink: GB/s in both directions together. The switches of Hopper and later add up.
    half, tensor, single = (1e12 * t for t in teraflops)
    flops = {"bfloat16": half, "default": tensor, "high": tensor, "highest": single}
    flops |= {"tf32x3": tensor / 3, "bfloat16x6": half / 6}
    source = f"{_NVIDIA}: {name.removesuffix(' SXM')} Tensor Core GPU, SXM"
    return Chip(
        name,
        source,
        gigabytes * 1e9,
        terabytes * 1e12,
        nvlink * 1e9 / 2,
        flops,
        8,
        reduces_in_network="A100" not in name,
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
    "a100": _gpu("A100 SXM", 80.0, 2.039, 600.0, (312.0, 156.0, 19.5)),
    "h100": _gpu("H100 SXM", 80.0, 3.35, 900.0, (989.5, 494.5, 67.0)),
    "h200": _gpu("H200 SXM", 141.0, 4.8, 900.0, (989.5, 494.5, 67.0)),
    "b200": _gpu("B200 SXM", 180.0, 7.7, 1800.0, (2250.0, 1125.0, 75.0)),
}
TPUS = ("v4", "v5e", "v5p", "v6e")
GPUS = ("a100", "h100", "h200", "b200")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips to plan for.

    Attributes: name: as given. kind: its first part; "cpu", or one of CHIPS. chip: None for processor cores, of which
      nothing is published here.
    """

    name: str
    chip: Chip | None
    count: int

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0].lower()

    @property
    def is_tpu(self) -> bool:
        return self.kind in TPUS

    @property
    def is_gpu(self) -> bool:
        return self.kind in GPUS


def parse_topology(name: str) -> Topology:
    """The topology of a name such as v5e:16x16, h200:8 or cpu:8.

    Raises: UserError for any other name.
    """
    kind, _, shape = name.partition(":")
    kind = kind.lower()
    sides = [int(side) for side in shape.split("x")] if re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5}){0,2}", shape) else []
    dimensions = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2, "cpu": 1, **dict.fromkeys(GPUS, 1)}.get(kind)
    if len(sides) != dimensions:
        raise UserError(
            f"--topology: expected a chip and a shape, such as v5e:16x16, v6e:4x4, v4:4x4x4, v5p:2x2x4, a100:8, "
            f"h100:8, h200:8, b200:8 or cpu:8; got {name!r}."
        )
    return Topology(name, CHIPS.get(kind), math.prod(sides))
