"""benchmarks/accelerator.py, which is to run unattended the day that a device is at hand, runs here on a CPU."""

import importlib
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from training_helpers import quick_compiles  # noqa: F401

from lipjax.plan import flops

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def accelerator():
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("accelerator")
    sys.path[:] = before


@pytest.fixture
def run(accelerator, monkeypatch, tmp_path, capsys):
    """Runs the script on one device as one that no PyTorch is installed beside; its code, numbers and output."""
    monkeypatch.setattr(accelerator.torch_liresnet, "torch", None)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])

    def call(*arguments):
        out = tmp_path / "numbers.json"
        code = accelerator.main(["--small", "--seconds=0.01", "--side=32", f"--out={out}", *arguments])
        return code, json.loads(out.read_text()), capsys.readouterr().out

    return call


@pytest.mark.nightly
@pytest.mark.x64_off
@pytest.mark.slow
def test_a_case_is_checked_and_measured(run):
    code, found, printed = run("--cases=liresnet", "--precisions=float32")
    assert code == 0 and printed.endswith("All checks hold.\n")
    checked, measured = found["check liresnet float32"], found["step liresnet float32"]
    assert checked["off"] == 0.0 and checked["control_fails"]  # the CPU against itself
    assert measured["finite"] and measured["images_per_second"] == pytest.approx(8e3 / measured["step_ms"])
    assert measured["share_of_products"] > 0 and measured["memory_mib"] > 0
    products = {kind.removesuffix("_tflops") for kind in found["products of side 32"]}
    assert {"bfloat16", "default", "high", "highest"} <= products <= set(flops.KINDS)


@pytest.mark.nightly
@pytest.mark.x64_off
def test_all_cases_in_all_precisions(run, accelerator):
    code, found, printed = run()
    assert code == 0, printed
    for case in accelerator.CASES:
        for precision in accelerator.PRECISIONS:
            assert found[f"check {case} {precision}"]["agrees"] and found[f"step {case} {precision}"]["finite"]
    assert found["check liresnet bfloat16"]["off"] > 0


@pytest.mark.x64_off
def test_a_device_that_computes_something_else_is_found(accelerator, monkeypatch):
    """Losses as a device would give them that rounds as it says, and as one that rounds more."""
    expected, draw = np.array([2.3, 2.25]), np.array([1e-8, 3e-8])

    class Host:
        run = type(
            "", (), {"config": type("", (), {"batch_size": 8}), "dataset": type("", (), {"image_shape": (32, 32, 3)})}
        )

    def moved_by(case, unit):
        return draw * unit / 2.0**-24

    def curve(step, state, change=lambda params: params):
        return expected + (1.0 if change(1.0) > 1 else 0.0) if step is Host else found

    monkeypatch.setattr(accelerator, "host_step", lambda case: (Host, None, expected))
    monkeypatch.setattr(accelerator, "moved_by", moved_by)
    monkeypatch.setattr(accelerator, "curve", curve)
    monkeypatch.setattr(accelerator.Step, "make", lambda *_: None)
    monkeypatch.setattr(accelerator, "make_config", lambda *_: None)
    device = type("", (), {"platform": "gpu"})
    for precision, off in (("float32", 2.0**-11), ("tf32", 2.0**-6), ("bfloat16", 2.0**-2)):
        unit = accelerator.unit_roundoff(precision, "gpu")
        found = expected + moved_by("", unit)
        assert accelerator.check("", precision, device)["agrees"], precision
        found = expected + moved_by("", off)
        assert not accelerator.check("", precision, device)["agrees"], precision


def test_what_fails_or_has_no_time_is_said_and_costs_no_other_row(run, accelerator, monkeypatch):
    monkeypatch.setattr(accelerator, "check", lambda *_: {"agrees": True})
    monkeypatch.setattr(accelerator, "measure", lambda *_: 1 / 0)
    code, found, printed = run("--cases=crm;cayley", "--precisions=tf32")
    assert code == 1 and printed.endswith("A check FAILED: see above.\n")
    assert found["check cayley tf32"] == {"agrees": True} and "division" in found["step crm tf32"]["failed"]
    monkeypatch.setattr(accelerator, "measure", lambda *_: {"finite": False})
    assert run("--cases=crm", "--precisions=tf32")[0] == 1
    monkeypatch.setattr(accelerator, "measure", lambda *_: {"finite": True})
    code, found, _ = run("--cases=crm", "--precisions=tf32", "--minutes=0")
    assert code == 0 and found["step crm tf32"] == {"left out": "no time"}


def test_a_step_that_met_a_nan_is_not_finite_whatever_its_loss(accelerator, monkeypatch):
    """Such a step changes nothing, so that later losses may be finite: what tells is the flag that stays."""

    class Latched:
        run = type("", (), {"fresh_state": staticmethod(lambda: 0)})
        operations, memory, compile_seconds, good = {"highest": 1.0}, 0, 0.0, False

        def __call__(self, state):
            return state, {"loss": np.float32(1.0), "finite": np.bool_(self.good)}

    step, args = Latched(), accelerator.parse(["--small", "--seconds=0.001"])
    monkeypatch.setattr(accelerator, "make_config", lambda *_: type("", (), {"batch_size": 8}))
    monkeypatch.setattr(accelerator.Step, "make", lambda *_: step)
    for good in (False, True):
        step.good = good
        assert accelerator.measure("crm", "float32", [None], {"highest": 1.0}, args)["finite"] is good


def test_units_are_those_of_the_devices(accelerator):
    eps = {"float32": 2.0**-24, "tf32": 2.0**-11, "bfloat16": 2.0**-8}
    for precision, unit in eps.items():
        assert accelerator.unit_roundoff(precision, "gpu") == unit
    assert accelerator.unit_roundoff("tf32", "cpu") == 2.0**-24
    assert accelerator.unit_roundoff("tf32", "tpu") == 2.0**-8
    assert (
        np.finfo(np.float32).eps == 2 * eps["float32"] and float(jax.numpy.finfo("bfloat16").eps) == 2 * eps["bfloat16"]
    )
