"""Plans: operations and traffic are counted as they are, for the step that a run really compiles, on any topology."""

import dataclasses
import importlib.util
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from training_helpers import shipped_configs, tiny_config

from lipjax import __main__ as program
from lipjax.errors import UserError
from lipjax.plan import chips, flops, hlo, plan, table
from lipjax.plan.command import read_config
from lipjax.training import sharding
from lipjax.training import step as steps
from lipjax.training.data import StreamDataset
from lipjax.training.loop import Run

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Without the user's own images nothing can be planned for them.
CONFIGS = [name for name in shipped_configs() if name != "own_images"]


def traced(f, *arrays):
    return flops.count(jax.jit(f).trace(*arrays).jaxpr)


def conv(x, kernel, **options):
    options = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), **options}
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_strides": (2, 3)},
        {"padding": ((0, 2), (-1, 3))},
        {"rhs_dilation": (2, 1)},
        {"lhs_dilation": (2, 3)},
    ],
)
def test_a_convolution_counts_its_products_with_true_pixels(options):
    images, kernel = jnp.ones((1, 6, 7, 2)), jnp.ones((3, 2, 2, 5))
    # With positive taps an entry of the dense matrix is 0 exactly where no product is made; two taps never share one.
    dense = jax.jit(jax.jacobian(lambda x: conv(x, kernel, **options)))(images)
    found, unknown = traced(lambda x, k: conv(x, k, **options), jnp.ones((4, 6, 7, 2)), kernel)
    assert found == {"default": 2 * 4 * np.count_nonzero(dense)} and unknown == []
    # The gradient of the kernel takes as many products again.
    both, _ = traced(jax.value_and_grad(lambda k, x: conv(x, k, **options).sum()), kernel, jnp.ones((4, 6, 7, 2)))
    assert both == {"default": 2 * found["default"]}


def test_operations_are_counted_by_precision_and_as_often_as_they_run():
    matrix, half = jnp.ones((8, 8), jnp.float32), jnp.ones((8, 8), jnp.bfloat16)
    once = 2 * 8**3
    assert traced(lambda a: a @ a, matrix) == ({"default": once}, [])
    assert traced(lambda a: a @ a, half) == ({"bfloat16": once}, [])
    assert traced(lambda a: jnp.matmul(a, a, precision="highest"), matrix) == ({"highest": once}, [])
    assert traced(lambda a: a @ a, matrix.astype(jnp.complex64)) == ({"default": 4 * once}, [])
    assert traced(lambda a: jax.lax.fori_loop(0, 5, lambda _, x: x @ x, a), matrix) == ({"default": 5 * once}, [])
    branches = [lambda a: a, lambda a: a @ a @ a]
    assert traced(lambda a: jax.lax.switch(a[0, 0].astype(int), branches, a), matrix) == ({"default": 2 * once}, [])
    endless = lambda a: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, a)  # noqa: E731
    assert traced(endless, matrix) == ({"default": once}, ["a loop of unknown length"])
    assert traced(lambda a: jax.checkpoint(lambda x: x @ x)(a), matrix) == ({"default": once}, [])
    found, _ = traced(jnp.linalg.cholesky, matrix)
    assert found == {"highest": pytest.approx(8**3 / 3)}
    found, _ = traced(lambda a: jnp.linalg.solve(a, a), matrix)
    assert found == {"highest": pytest.approx(2 / 3 * 8**3 + 2 * 8**3)}
    found, _ = traced(jnp.fft.fft2, jnp.ones((3, 8, 8), jnp.complex64))
    assert found == {"highest": 3 * 5 * 64 * math.log2(64)}
    assert traced(jnp.linalg.eigvalsh, matrix)[1] == ["eigh"]


def test_shard_map_counts_every_device():
    mesh = sharding.make_mesh(8, 8)
    spec = sharding.batch_sharded(mesh).spec
    local = jax.shard_map(lambda a: a @ jnp.ones((4, 4), a.dtype), mesh=mesh, in_specs=spec, out_specs=spec)
    assert traced(local, jnp.ones((16, 4))) == ({"default": 2 * 16 * 4 * 4}, [])


def compiled(f, *arrays, **options):
    return hlo.Program(jax.jit(f, **options).lower(*arrays).compile().as_text())


def test_the_compiled_program_of_one_device_has_its_operations():
    x, kernel = jnp.ones((4, 9, 8, 3), jnp.float32), jnp.ones((3, 3, 3, 5), jnp.float32)

    def f(x, kernel):
        y = conv(x, kernel, window_strides=(2, 1), precision="highest")
        grown = jax.lax.fori_loop(0, 7, lambda _, a: jnp.sin(a @ a), y[0, 0] @ y[0, 0].T)
        return y, grown, jax.grad(lambda k: (conv(x, k, window_strides=(2, 1)) ** 2).sum())(kernel)

    expected, _ = traced(f, x, kernel)
    found = compiled(f, x, kernel)
    assert found.num_devices == 1 and found.unknown_loops == 0 and found.collectives() == []
    assert found.flops() == expected and set(expected) == {"default", "highest"}


def test_collectives_of_a_compiled_program():
    mesh = sharding.make_mesh(4, 8, model=2)
    everywhere, split = sharding.replicated(mesh), sharding.batch_sharded(mesh)
    parts = NamedSharding(mesh, PartitionSpec(sharding.MODEL))
    x = jax.device_put(jnp.ones((16, 32), jnp.float32), split)
    w = jax.device_put(jnp.ones((32, 32), jnp.float32), parts)
    found = compiled(lambda x, w: x.sum(0) + w[0], x, w, out_shardings=everywhere)
    assert found.num_devices == 8
    reduced = [c for c in found.collectives() if c.kind == "all-reduce"]
    assert (8, 32 * 4, 1) in [(c.group, c.bytes, c.times) for c in reduced]

    gather = lambda w: jax.lax.all_gather(w, sharding.MODEL)  # noqa: E731
    gather = jax.shard_map(gather, mesh=mesh, in_specs=parts.spec, out_specs=PartitionSpec(), check_vma=False)
    assert [(c.kind, c.group, c.bytes) for c in compiled(gather, w).collectives()] == [("all-gather", 2, 32 * 32 * 4)]

    def often(x):
        step = lambda a: jax.lax.psum(jnp.sin(a), (sharding.DATA, sharding.MODEL))  # noqa: E731
        return jax.lax.fori_loop(
            0, 5, lambda _, a: jax.lax.pcast(step(a), (sharding.DATA, sharding.MODEL), to="varying"), x
        )

    looped = jax.shard_map(often, mesh=mesh, in_specs=split.spec, out_specs=split.spec)
    found = compiled(looped, x)
    assert [(c.kind, c.group, c.bytes, c.times) for c in found.collectives()] == [("all-reduce", 8, 2 * 32 * 4, 5)]
    assert found.collectives()[0].link_bytes() == 5 * 2 * 7 / 8 * 256
    assert found.collectives()[0].link_bytes(reduces_in_network=True) == 5 * 7 / 8 * 256

    axes = (sharding.DATA, sharding.MODEL)
    twice = jax.shard_map(lambda x: jax.lax.psum(jnp.sin(jax.lax.psum(x, axes)), axes), in_specs=split.spec,
                          out_specs=PartitionSpec(), mesh=mesh, check_vma=False)  # fmt: skip
    assert [(c.kind, c.bytes) for c in compiled(twice, x).collectives()] == [("all-reduce", 2 * 32 * 4)] * 2


PROGRAM = """HloModule jit_f, is_scheduled=true, replica_count=1, num_partitions=16

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(4,128)(2,1)S(1)}) parameter(0)
  %x = bf16[4,8]{1,0:T(4,128)(2,1)} get-tuple-element(%p), index=1
  %r = bf16[4,8]{1,0} all-reduce(%x), replica_groups=[2,8]<=[16], to_apply=%add
  ROOT %t = (s32[], bf16[4,8]) tuple(%x, %r)
}

%limit (p.1: (s32[], bf16[4,8])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  %p.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %three), direction=LT
}

%wrapped (q: f32[4]) -> f32[2] {
  %q = f32[4]{0} parameter(0)
  ROOT %s = f32[2]{0} reduce-scatter(%q), replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%add
}

%one_fusion (f.1: f32[5]) -> f32[5] {
  %f.1 = f32[5]{0} parameter(0)
  ROOT %beside = f32[5]{0:S(1)} all-to-all(%f.1), channel_id=3, replica_groups=mesh['a'=8,'b'=2] {'a':(2)4,'b'}
}

%another (f.2: f32[5]) -> f32[5] {
  %f.2 = f32[5]{0} parameter(0)
  ROOT %again = f32[5]{0} all-to-all(%f.2), channel_id=3, replica_groups=mesh['a'=8,'b'=2] {'a':(2)4,'b'}
}

ENTRY %main (x: bf16[4,8]) -> f32[] {
  %x.1 = bf16[4,8]{1,0} parameter(0)
  %w = (s32[], bf16[4,8]) while(%x.1), condition=%add, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  %g = ((f32[3], f32[5]), (f32[6]{0}, f32[10]{0})) all-gather-start(%x.1, %x.1), replica_groups=mesh['a'=8,'b'=2] {'b'}
  %d = (f32[6]{0}, f32[10]{0}) all-gather-done(%g)
  %c = (f32[7]{0}, f32[7]{0}, u32[], u32[]) collective-permute-start(%x.1), source_target_pairs={{0,1},{1,0}}
  %v = ((f32[4]{0}), f32[2]{0}, u32[]) async-start(%x.1), calls=%wrapped
  %alone = f32[9]{0} all-reduce(%x.1), replica_groups={{0},{1}}, to_apply=%add
  %u = (s32[], bf16[4,8]) while(%w), condition=%add, body=%body
  %l = (s32[], bf16[4,8]) while(%u), condition=%limit, body=%body
  %f = f32[5]{0} fusion(%x.1), kind=kLoop, calls=%one_fusion
  ROOT %h = f32[5]{0} fusion(%f), kind=kLoop, calls=%another
}
"""


def test_notations_of_collectives():
    program_ = hlo.Program(PROGRAM)
    assert program_.num_devices == 16 and program_.unknown_loops == 1
    found = {}
    for c in program_.collectives():
        found[c.kind] = (c.group, c.bytes, c.times + found.get(c.kind, (0, 0, 0))[2])
    assert found == {
        "all-reduce": (8, 4 * 8 * 2, 10),  # in all: six times, three times, and once in the loop of unknown length
        "all-gather": (2, 16 * 4, 1),
        "collective-permute": (2, 7 * 4, 1),
        "reduce-scatter": (2, 4 * 4, 1),
        "all-to-all": (8, 5 * 4, 1),  # the same in two fusions
    }
    assert sum(c.link_bytes() for c in program_.collectives()) == 10 * 2 * 7 / 8 * 64 + 32 + 28 + 8 + 7 / 8 * 20


def test_topologies_by_name():
    pod = chips.parse_topology("v5e:16x16")
    assert (pod.count, pod.is_tpu, pod.chip) == (256, True, chips.CHIPS["v5e"])
    assert chips.parse_topology("v4:2x2x4").count == 16 and chips.parse_topology("H200:8").chip is chips.CHIPS["h200"]
    assert chips.parse_topology("cpu:8") == chips.Topology("cpu:8", None, 8, False)
    for name in ("v5e", "v5e:16", "v5e:4x4x4", "h100:2x4", "tpu:4", "cpu:0", "v5e:0x4", "v5e:4x", ""):
        with pytest.raises(UserError, match="expected a chip and a shape"):
            chips.parse_topology(name)


def example(**changes):
    chip = dataclasses.replace(chips.CHIPS["v5e"], memory=1000.0, bandwidth=100.0, links=10.0)
    fields = {
        "topology": chips.Topology("v5e:2x2", chip, 4, True),
        "hosts": 2,
        "compiler": "a compiler",
        "stand_in": False,
        "batch": 64,
        "parameters": 10,
        "num_steps": 3600,
        "compile_seconds": 1.0,
        "memory": plan.Memory(arguments=300, outputs=200, temporaries=150, aliased=180, code=30),
        "overflow": "",
        "traced": {"default": 4 * 197e12},
        "uncounted": [],
        "flops": {"default": 197e12, "highest": 197e12 / 6},
        "xla_flops": 0.0,
        "xla_bytes": 0.0,
        "collectives": [hlo.Collective("all-reduce", 4, 40, 2)],
        "unknown_loops": 0,
    }
    return plan.Plan(**fields | changes)


def test_bounds_follow_from_peak_figures():
    found = example()
    assert found.memory is not None and found.memory.total == 500 and found.fits
    assert found.seconds == pytest.approx({"compute": 2.0, "memory": 8.0, "links": 12.0})
    assert found.bound == pytest.approx(12.0)
    assert found.chip_hours == pytest.approx(48) and found.images_per_host == pytest.approx(64 / 12 / 2)
    # What a stand-in keeps in its memory says nothing about the chip; what it cannot show is taken from the trace.
    assert example(stand_in=True).seconds["memory"] == pytest.approx(5.0)
    assert example(flops={"default": 1.0}).seconds["compute"] == pytest.approx(1.0)
    # Nor are its kinds those of the chip: it widens bfloat16.
    widened = example(stand_in=True, traced={"bfloat16": 3e12, "highest": 1e12}, flops={"default": 0.98e12}).work
    assert widened == pytest.approx({"bfloat16": 0.735e12, "highest": 0.245e12})
    assert not example(memory=dataclasses.replace(found.memory, temporaries=700)).fits
    assert example(topology=chips.parse_topology("cpu:4")).seconds == {}


def test_advice_names_the_settings_that_help_first():
    config = tiny_config()
    images = table.advice(example(memory=plan.Memory(10, 0, 2000, 0, 0)), config)
    state = table.advice(example(memory=plan.Memory(2000, 0, 10, 0, 0)), config)
    assert images.index("config.accumulation") < images.index("config.mesh.model")
    assert state.index("config.mesh.model") < state.index("config.accumulation")
    refused = table.advice(example(memory=None, overflow="Used 20G of 15.75G hbm"), config)
    assert "Used 20G of 15.75G hbm" in refused and "config.remat" in refused and "config.batch_size" in refused
    assert plan._overflow(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.30G of 15.75G hbm. x"
    ) == ("Used 24.30G of 15.75G hbm")
    assert plan._overflow("INTERNAL: something else") == ""


def load(name, *overrides):
    return read_config(name, list(overrides))


def planned_run(config, count=8):
    mesh = sharding.make_mesh(**config.mesh, batch_size=config.batch_size, devices=jax.devices()[:count])
    return Run(config, config.seeds[0], mesh, plan.planned_dataset(config.data, config.seeds[0]))


@pytest.mark.x64_off
def test_the_plan_compiles_what_a_run_runs(monkeypatch):
    """Both lower to the same program: of an array data set, and of a stream."""
    config = tiny_config(**{"mesh.data": 2})
    caught = []

    def catching(jit):
        def jit_step(*arguments):
            jitted = jit(*arguments)
            return lambda *inputs: caught.append(jitted.lower(*inputs).as_text()) or (None, None)

        return jit_step

    run = Run(config, 0)
    planned = [plan.traced_step(run).lower().as_text()]
    shape = run.dataset.image_shape
    stream = _StreamOf(
        "made up", {s: plan._NoRecords(run.dataset.size(s)) for s in ("train", "validation")}, 3, shape[0]
    )
    streaming = Run(config, 0, run.mesh, stream)
    planned.append(plan.traced_step(streaming).lower().as_text())
    monkeypatch.setattr(steps, "jit_array_step", catching(steps.jit_array_step))
    monkeypatch.setattr(steps, "jit_stream_step", catching(steps.jit_stream_step))
    schedule = plan.objective.loss_schedule(config.loss, 0, config.num_epochs)
    with jax.default_matmul_precision(config.matmul_precision):
        for each in (run, streaming):
            key = jax.device_put(jax.random.key(0), sharding.replicated(run.mesh))
            each.batch_runner(0)(dataclasses.replace(each.abstract_state, key=key), 0, schedule)
    assert planned == caught and planned[0] != planned[1]


class _StreamOf(StreamDataset):
    @property
    def image_shape(self):
        return self.image_size, self.image_size, 1

    def train_batches(self, batch_size, *_):
        yield np.zeros((batch_size, *self.image_shape), np.uint8), np.zeros(batch_size, np.int32)


@pytest.mark.x64_off
def test_a_plan_of_two_topologies_agrees_with_the_trace_and_with_xla():
    config = tiny_config(**{"mesh.data": -1})
    one, eight = (plan.make_plan(config, chips.parse_topology(f"{name}")) for name in ("cpu:1", "h200:8"))
    assert (one.stand_in, eight.stand_in) == (False, True)
    for found in (one, eight):
        share = sum(found.traced.values()) / found.topology.count
        assert 0.9 * share <= sum(found.flops.values())
        # XLA adds what is elementwise: in a net this narrow, as much again.
        assert sum(found.flops.values()) <= found.xla_flops < 4 * sum(found.flops.values())
    assert one.collectives == [] and one.link_bytes == 0
    # Every gradient is summed over the devices.
    assert eight.link_bytes >= 4 * eight.parameters * 7 / 8
    assert eight.num_steps == one.num_steps == Run(config, 0).total_steps
    shown = table.table([one, eight])
    assert shown.splitlines()[0] == "| | cpu:1 | h200:8 |" and "roughly" in shown and "NVIDIA data sheet" in shown


def test_planned_data_sets_have_the_sizes_of_the_real_ones():
    config = load("liresnet:cifar10").data
    found = plan.planned_dataset(config, 0)
    assert found.image_shape == (32, 32, 3) and found.num_classes == 10
    assert [found.size(split) for split in ("train", "validation", "test")] == [49_000, 1_000, 10_000]
    stream = plan.planned_dataset(load("liresnet:imagenet").data, 0)
    assert isinstance(stream, StreamDataset) and stream.image_shape == (224, 224, 3)
    assert stream.size("train") == 1_281_167 - 12_812


@pytest.mark.x64_off
@pytest.mark.parametrize("name", ["digits", "liresnet:imagenet", "lipconvnet:cifar10,mlp", "mnist_4c3f_crm"])
def test_configs_of_each_family_are_planned(name):
    check_traced(name)


@pytest.mark.nightly
@pytest.mark.x64_off
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_planned(name):
    check_traced(name).lower()


def check_traced(name):
    config = load(name)
    run = planned_run(config)
    step = plan.traced_step(run)
    operations, uncounted = flops.count(step.jaxpr)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.abstract_state.params))
    # A parameter is used at least once for every image, in the forward pass and in both gradients, unless it is one of
    # the many that become a few: then at least once in a step.
    assert sum(operations.values()) >= 2 * parameters and set(uncounted) <= {"eigh"}
    assert run.total_steps == run.num_images // run.num_real * config.num_epochs
    return step


@pytest.fixture
def lipjax_command(capsys):
    def call(*arguments):
        jax.devices()  # of this process, with all its devices: the command then takes them as they are
        code = program.main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


def test_what_cannot_be_planned_is_said(lipjax_command, monkeypatch):
    command = ("plan", f"--config={ROOT / 'configs' / 'digits.py'}")
    for arguments, message in (
        (("--topology=v5e:2",), "expected a chip and a shape, such as v5e:16x16"),
        (("--topology=cpu:3",), "config.batch_size = 128 does not divide over 3 devices"),
        (("--topology=cpu:4", "--config.mesh.model=3"), "config.mesh.model = 3 does not divide"),
        (("--topology=cpu:1", "--config.batch_sizes=4"), "Did you mean config.batch_size"),
        (("--topology=cpu:1", "more"), "unexpected arguments ['more']"),
        (("--topology=cpu:9",), "needs 9 devices of the host"),
    ):
        code, _, err = lipjax_command(*command, *arguments)
        assert code == 2 and message in err, err
    with pytest.raises(SystemExit, match="2"):
        lipjax_command("report", "a", "--topology=cpu:1")
    small = dataclasses.replace(chips.CHIPS["h100"], memory=1e4)
    monkeypatch.setitem(chips.CHIPS, "h100", small)
    tiny = ("--config.power_iterations=1", "--config.model.depth=1", "--config.data.affine=(0.0, 0.0, 0.0)")
    code, out, err = lipjax_command(*command, "--topology=h100:2", "--images_per_chip=8", *tiny)
    assert code == 2 and "does not fit: roughly" in out and "| 16, 8 |" in out
    assert "The step does not fit h100:2" in err and "config.accumulation" in err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_plan_by_libtpu():
    command = [sys.executable, "-m", "lipjax", "plan", "--config=configs/digits.py", "--topology=v5e:2x2"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Compiled by libtpu" in done.stdout and "| all-reduce per step |" in done.stdout
