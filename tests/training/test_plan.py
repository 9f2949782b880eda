"""Plans: operations and traffic are counted as they are, for the step that a run really compiles, on any topology."""

import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiers import everyday
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


def test_topologies_by_name():
    pod = chips.parse_topology("v5e:16x16")
    assert (pod.count, pod.is_tpu, pod.chip) == (256, True, chips.CHIPS["v5e"])
    assert chips.parse_topology("v4:2x2x4").count == 16 and chips.parse_topology("H200:8").chip is chips.CHIPS["h200"]
    assert chips.parse_topology("cpu:8") == chips.Topology("cpu:8", None, 8)
    kinds = {
        kind: chips.parse_topology(f"{kind}:{shape}") for kind, shape in (("b200", 8), ("v4", "2x2x1"), ("cpu", 2))
    }
    assert {kind: (found.kind, found.is_tpu, found.is_gpu) for kind, found in kinds.items()} == {
        "b200": ("b200", False, True),
        "v4": ("v4", True, False),
        "cpu": ("cpu", False, False),
    }
    for name in ("v5e", "v5e:16", "v5e:4x4x4", "h100:2x4", "tpu:4", "cpu:0", "v5e:0x4", "v5e:4x", ""):
        with pytest.raises(UserError, match="expected a chip and a shape"):
            chips.parse_topology(name)


def example(**changes):
    chip = dataclasses.replace(chips.CHIPS["v5e"], memory=1000.0, bandwidth=100.0, links=10.0)
    fields = {
        "topology": chips.Topology("v5e:2x2", chip, 4),
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
        "kernels": {},
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
    # Nor does a GPU's library say how precise it is.
    called = example(traced={"default": 3e12, "highest": 1e12}, flops={"library": 0.9e12, "highest": 0.08e12}).work
    assert called == pytest.approx({"default": 0.735e12, "highest": 0.245e12})
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


def test_a_plan_warns_of_work_that_chips_repeat():
    text = table.warning(example())  # 1 and 1/6 of what was traced
    assert text.startswith("Warning: on v5e:2x2") and " 1.17 times " in text and "docs/scale.md" in text
    assert table.warning(example(flops={"default": 1.09 * 197e12})) == ""
    assert table.warning(example(flops={"default": 1.11 * 197e12})) != ""
    assert table.warning(example(memory=None)) == ""  # not compiled


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


@pytest.mark.nightly
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
@pytest.mark.parametrize(
    "name",
    everyday(["digits", "liresnet:imagenet", "lipconvnet:cifar10,mlp", "mnist_4c3f_crm"], "lipconvnet:cifar10,mlp"),
)
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
