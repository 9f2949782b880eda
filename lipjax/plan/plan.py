"""python -m lipjax plan: memory, operations, traffic and time of a config's training step on chips that are not here.

The step that training would run is compiled ahead of time: by libtpu for a TPU topology and by XLA's GPU compiler for
GPUs, where they are installed; else for as many devices of this machine's processor, whose collectives and operations
stand in for those of the chips.
"""

import dataclasses
import functools
import importlib.util
import math
import re
import time
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from lipjax.errors import UserError
from lipjax.plan import flops as flop_counts
from lipjax.plan import hlo
from lipjax.plan.chips import Topology
from lipjax.plan.gpus import target_config
from lipjax.training import objective, sharding
from lipjax.training import step as steps
from lipjax.training.config import validate
from lipjax.training.data import ArrayDataset, StreamDataset, load_dataset
from lipjax.training.data.arrays import Split
from lipjax.training.data.load import IMAGENET_SIZE
from lipjax.training.data.prepared import PREPARED
from lipjax.training.loop import Run

# libtpu asks the network what TPU it runs on unless it is told; JAX does not load XLA's GPU compiler without a driver.
_NO_HARDWARE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no hardware is used: several plans may be made at a time
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
# No algorithms can be timed where there is no GPU.
_GPU_OPTIONS: dict[str, Any] = {"xla_gpu_autotune_level": 0}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip. aliased: of the outputs, what takes the place of arguments; code: of the program."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Plan:
    """The needs of a config's training step on a topology.

    Attributes:
      hosts: that feed it with images. compiler: what compiled the step. stand_in: whether for other devices than the
        topology's.
      batch: images of a step, on all chips. parameters: numbers that are trained. num_steps: of the whole run.
      compile_seconds: on this machine.
      memory: None where the step does not fit; overflow: then what the compiler says.
      traced: floating-point operations of a step on all chips together, as JAX traced it, by `flops.KINDS`; uncounted:
        what is missing there.
      flops: the same of one chip, as compiled, "library" being a kind of its own (`hlo.Program.flops`). xla_flops,
        xla_bytes: of one chip by XLA's own count, of operations (elementwise ones too, loops once) and of bytes read
        and written (on-chip memory too); 0.0: not counted.
      collectives: of one chip. unknown_loops: in the compiled program, counted once. kernels: that a GPU starts in a
        step, at least, by `hlo.Program.kernels`; {} for other chips.
    """

    topology: Topology
    hosts: int
    compiler: str
    stand_in: bool
    batch: int
    parameters: int
    num_steps: int
    compile_seconds: float
    memory: Memory | None
    overflow: str
    traced: dict[str, float]
    uncounted: list[str]
    flops: dict[str, float]
    xla_flops: float
    xla_bytes: float
    collectives: list[hlo.Collective]
    unknown_loops: int
    kernels: dict[str, int]

    @property
    def fits(self) -> bool:
        chip = self.topology.chip
        return self.memory is not None and (chip is None or self.memory.total <= chip.memory)

    @property
    def repeated(self) -> float:
        """Operations that all chips make in the compiled program, over those traced: above 1 they repeat work."""
        total = sum(self.traced.values())
        return sum(self.flops.values()) * self.topology.count / total if total else 1.0

    @functools.cached_property
    def work(self) -> dict[str, float]:
        """Operations of one chip by kind: as compiled, or its share of what was traced where some are out of sight.

        XLA leaves out what nobody uses, which is little; an operation of a library may be out of sight. A stand-in
        widens bfloat16 numbers and a GPU's library does not say how precise it is: there the kinds are those that were
        traced.
        """
        share = {kind: operations / self.topology.count for kind, operations in self.traced.items()}
        total, compiled = sum(share.values()), sum(self.flops.values())
        if compiled < 0.9 * total:
            return share
        if not self.stand_in and "library" not in self.flops:
            return self.flops
        return {kind: operations / total * compiled for kind, operations in share.items()} if total else self.flops

    @property
    def link_bytes(self) -> float:
        """Bytes that a chip sends or receives in a step, at least."""
        in_network = self.topology.chip is not None and self.topology.chip.reduces_in_network
        return sum((c.link_bytes(in_network) for c in self.collectives), 0.0)

    @functools.cached_property
    def seconds(self) -> dict[str, float]:
        """Lower bounds of a step's time at the chip's peak figures: {} for devices without any.

        "compute": products and convolutions alone. "memory": every argument is read, every output written, and each
        byte of temporaries written and read (those of a stand-in are not counted). "links": `link_bytes`.
        """
        chip = self.topology.chip
        if chip is None:
            return {}
        bounds = {"compute": sum((operations / chip.flops[kind] for kind, operations in self.work.items()), 0.0)}
        if self.memory is not None:
            moved = self.memory.arguments + self.memory.outputs
            moved += 0 if self.stand_in else 2 * self.memory.temporaries
            bounds |= {"memory": moved / chip.bandwidth, "links": self.link_bytes / chip.links}
        return bounds

    @property
    def bound(self) -> float:
        """Seconds that a step takes at least: the largest of the bounds, as if all three overlapped perfectly."""
        return max(self.seconds.values())

    @property
    def chip_hours(self) -> float:
        """Of all training steps of one seed at that bound, without validation and certification."""
        return self.num_steps * self.bound * self.topology.count / 3600

    @property
    def images_per_host(self) -> float:
        """Images per second that each host has to deliver for steps of that bound."""
        return self.batch / self.bound / self.hosts


def planned_dataset(config: Any, seed: int) -> ArrayDataset | StreamDataset:
    """A data set with the shapes, sizes and classes that the config group `data` describes, and images of zeros.

    Only the user's own data and what comes with lipjax is read. A validation split may be larger or smaller than the
    real one by the rounding in each class.
    """
    if config.name not in PREPARED:
        return load_dataset(config, seed)
    prepared = PREPARED[config.name]
    validation = int(config.validation_fraction * prepared.train + 0.5)
    sizes = {"train": prepared.train - validation, "validation": validation, "test": prepared.test}
    if prepared.image_shape is None:
        splits = {split: _NoRecords(size) for split, size in sizes.items()}
        return StreamDataset(config.name, splits, prepared.num_classes, config.image_size or IMAGENET_SIZE)
    height, width, channels = prepared.image_shape
    shape = config.image_size or height, config.image_size or width, channels
    images = {
        split: Split(np.broadcast_to(np.uint8(0), (size, *shape)), np.broadcast_to(np.int32(0), (size,)))
        for split, size in sizes.items()
    }
    return ArrayDataset(config.name, images["train"], images["validation"], images["test"], prepared.num_classes)


@dataclasses.dataclass(frozen=True)
class _NoRecords:
    """Records of which only the number is known."""

    count: int

    @property
    def where(self) -> str:
        return "a plan"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise ValueError("A plan has no images.")


def planned_run(config: Any, devices: list) -> Run:
    """The run of a config's first seed on devices that need not be here, with images of zeros."""
    mesh = sharding.make_mesh(**config.mesh, batch_size=config.batch_size, devices=devices)
    return Run(config, config.seeds[0], mesh, planned_dataset(config.data, config.seeds[0]))


def traced_step(run: Run, platform: str | None = None) -> Any:
    """The step that a run would jit, traced (`jax.stages.Traced`) for arrays that need not exist.

    platform: of other devices than the run's, as `make_train_step`: for what is counted, not to be compiled.
    """
    config, mesh = run.config, run.mesh
    options = run.model, run.optimizer, config, mesh, run.pixel_max, run.class_weights
    train_step = steps.make_train_step(*options, platform=platform)
    schedule = objective.loss_schedule(config.loss, 0, config.num_epochs)
    split, everywhere = sharding.batch_sharded(mesh), sharding.replicated(mesh)

    def arrays(count, where):
        images = jax.ShapeDtypeStruct((count, *run.dataset.image_shape), np.uint8, sharding=where)
        return images, jax.ShapeDtypeStruct((count,), np.int32, sharding=where)

    generated = arrays(run.num_generated, split) if run.num_generated else None
    with jax.default_matmul_precision(config.matmul_precision):
        if isinstance(run.dataset, StreamDataset):
            jitted = steps.jit_stream_step(train_step, mesh, run.shardings)
            return jitted.trace(run.abstract_state, *arrays(run.num_real, split), schedule, generated)
        jitted = steps.jit_array_step(train_step, mesh, run.num_real, run.shardings)
        order = jax.ShapeDtypeStruct((run.num_images,), np.int32, sharding=everywhere)
        return jitted.trace(run.abstract_state, *arrays(run.num_images, everywhere), order, 0, schedule, generated)


def compiled_step(run: Run, traced: jax.stages.Traced) -> jax.stages.Compiled:
    """The program of a run's `traced_step`, for the devices of its mesh.

    Raises: jax.errors.JaxRuntimeError if it does not compile.
    """
    on_gpu = run.mesh.devices.flat[0].platform == "gpu"
    with jax.default_matmul_precision(run.config.matmul_precision):
        return traced.lower().compile(compiler_options=_GPU_OPTIONS if on_gpu else None)


def make_plan(config: Any, topology: Topology, devices: list | None = None) -> Plan:
    """Compiles a config's training step for a topology. devices: what to compile for; None: those of
    `topology_devices`.

    Raises: UserError if the config does not suit the topology (a batch that does not divide, ...) or itself.
    """
    validate(config)
    if devices is None:
        devices = topology_devices(topology)
    platform = devices[0].platform
    stand_in = platform == "cpu" and topology.chip is not None
    run = planned_run(config, devices)
    traced = traced_step(run)
    # A stand-in cannot multiply as the chips do.
    counted = traced_step(run, "gpu") if stand_in and not topology.is_tpu else traced
    operations, uncounted = flop_counts.count(counted.jaxpr)
    start, overflow, memory, program, costs = time.perf_counter(), "", None, hlo.Program(""), {}
    try:
        compiled = compiled_step(run, traced)
    except jax.errors.JaxRuntimeError as error:
        overflow = _overflow(str(error))
        if not overflow:
            raise
    else:
        stats = compiled.memory_analysis()
        names = ("argument", "output", "temp", "alias", "generated_code")
        memory = Memory(*(getattr(stats, f"{name}_size_in_bytes") for name in names))
        costs, program = compiled.cost_analysis() or {}, hlo.Program(compiled.as_text() or "")
    per_host = topology.chip.chips_per_host if topology.chip else topology.count
    processes = len({device.process_index for device in devices})
    return Plan(
        topology=dataclasses.replace(topology, count=run.mesh.devices.size),
        hosts=math.ceil(run.mesh.devices.size / per_host) if platform != "tpu" else processes,
        compiler=_compiler(devices) + (", a stand-in" if stand_in else ""),
        stand_in=stand_in,
        batch=config.batch_size,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(run.abstract_state.params)),
        num_steps=run.total_steps,
        compile_seconds=time.perf_counter() - start,
        memory=memory,
        overflow=overflow,
        traced=operations,
        uncounted=uncounted,
        flops=program.flops(),
        xla_flops=costs.get("flops", 0.0),
        xla_bytes=costs.get("bytes accessed", 0.0),
        collectives=program.collectives(),
        unknown_loops=program.unknown_loops,
        kernels=program.kernels() if platform == "gpu" else {},
    )


def _overflow(message: str) -> str:
    """The message of a compiler about memory that does not suffice; "" if its error is another one."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return ""
    found = re.search(r"Used [\d.]+[KMGT]? of [\d.]+[KMGT]? \w+", message)
    return found[0] if found else message.splitlines()[0][:200]


def _compiler(devices: list) -> str:
    if devices[0].platform == "cpu":
        return "XLA for the CPU"
    if devices[0].platform == "gpu":
        plugin = cuda_plugin()
        return f"XLA for GPUs ({plugin} {version(plugin)})"
    return f"libtpu {version('libtpu')}"


def cuda_plugin() -> str:
    """The package of JAX that holds XLA's GPU compiler, "jax-cuda13-plugin" for one; "" if there is none."""
    for cuda in ("cuda13", "cuda12"):
        try:
            if importlib.util.find_spec(f"jax_plugins.xla_{cuda}") is not None:
                return f"jax-{cuda}-plugin"
        except ModuleNotFoundError:  # no plugin at all
            return ""
    return ""


def topology_devices(topology: Topology) -> list:
    """Devices to compile for: the chips themselves if their compiler is installed, else as many of the host's.

    Raises: UserError for a topology that its compiler does not know, or too few devices of the host.
    """
    if topology.is_tpu and importlib.util.find_spec("libtpu") is not None:
        # The two cores of these chips are one device, as JAX has them by default.
        options = {"chip_config_name": "megacore"} if topology.kind in ("v4", "v5p") else {}
        return _described(topology, "libtpu", "tpu", {"topology_name": topology.name, **options})
    if topology.is_gpu and cuda_plugin():
        assert topology.chip is not None
        hosts, rest = divmod(topology.count, topology.chip.chips_per_host)
        if hosts and rest:
            raise UserError(
                f"--topology={topology.name}: expected up to {topology.chip.chips_per_host} GPUs, or a multiple."
            )
        shape = f"1x{hosts}x{topology.chip.chips_per_host}" if hosts else f"1x1x{rest}"
        options = {"target_config": target_config(topology.kind), "topology": shape}
        return _described(topology, cuda_plugin(), "cuda", options)
    devices = jax.devices("cpu")
    if len(devices) < topology.count:
        raise UserError(
            f"--topology={topology.name} needs {topology.count} devices of the host to compile for, and JAX made "
            f"{len(devices)} before it was asked: start with XLA_FLAGS="
            f"--xla_force_host_platform_device_count={topology.count}."
        )
    return devices[: topology.count]


def _described(topology: Topology, compiler: str, platform: str, options: dict[str, str]) -> list:
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform=platform, **options).devices)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"--topology={topology.name}: {compiler} cannot make it ({str(error).splitlines()[0][:200]})."
        ) from error
