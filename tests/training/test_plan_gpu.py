"""Plans for GPUs: what XLA is told about them, what is read from its programs, and every family of models compiled."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks.gpu_compile import PROGRAMS, faults, program_config
from lipjax.errors import UserError
from lipjax.models import MODELS
from lipjax.plan import chips, hlo, plan
from lipjax.plan.gpus import gpu_facts, target_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
NEEDED = pytest.mark.skipif(
    not plan.cuda_plugin(),
    reason="needs XLA's GPU compiler, and no GPU: pip install -e '.[gpu-plan,test]' in an environment of its own",
)


@pytest.mark.parametrize("kind", chips.GPUS)
def test_descriptions_agree_with_the_data_sheets(kind):
    """Two sources of the same GPU, XLA's and the vendor's."""
    chip, facts = chips.CHIPS[kind], gpu_facts(kind)
    # An addition and a multiplication per unit and clock.
    float32 = 2 * facts["core_count"] * facts["fpus_per_core"] * facts["clock_rate_ghz"] * 1e9
    assert float32 == pytest.approx(chip.flops["highest"], rel=0.01)
    assert facts["memory_bandwidth"] == pytest.approx(chip.bandwidth, rel=0.01)
    assert facts["device_memory_size"] == pytest.approx(chip.memory, rel=0.08)  # 80 "GB" may be GiB
    assert chip.flops["bfloat16"] == pytest.approx(2 * chip.flops["default"], rel=0.01)
    text = target_config(kind)
    assert text.count("{") == text.count("}") == 3 and kind.upper() in text
    assert f"core_count: {facts['core_count']}\n" in text and 'platform_name: "CUDA"' in text


# Lines of what XLA made for an H100 of the gradient of a convolution (3x3, 16 to 32 channels, stride 2, images 9x8 with
# padding 1_1x0_2) and of a product (512x256x128), without Triton.
LIBRARY = """HloModule jit_f, is_scheduled=true, replica_count=1, num_partitions=1

ENTRY %main (k: f32[3,3,16,32]) -> f32[512,256] {
  %t = f32[32,3,3,16]{3,2,1,0} fusion(%k), kind=kInput, calls=%transpose
  %x9 = f32[4,9,9,16]{3,2,1,0} fusion(%x), kind=kLoop, calls=%pad.1
  %x11 = f32[4,11,10,16]{3,2,1,0} fusion(%x), kind=kLoop, calls=%pad
  %y = (f32[4,5,4,32]{3,2,1,0}, u8[0]{0}) custom-call(%x11, %t), window={size=3x3 stride=2x2}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %g = f32[4,5,4,32]{3,2,1,0} get-tuple-element(%y), index=0
  %bf = (f32[32,3,3,16]{3,2,1,0}, u8[0]{0}) custom-call(%x9, %g), window={size=3x3 stride=2x2 pad=1_1x0_0}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %bi = (f32[4,9,9,16]{3,2,1,0}, u8[0]{0}) custom-call(%g, %t), window={size=3x3 stride=2x2 pad=1_1x0_0}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %a = f32[512,256]{1,0} parameter(2)
  %b = f32[256,128]{1,0} parameter(3)
  %ab = (f32[512,128]{1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %s = f32[512,128]{1,0} all-reduce-start(%c), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %d = f32[512,128]{1,0} all-reduce-done(%s)
}
"""  # noqa: E501


def test_calls_of_libraries_have_their_operations():
    # Pairs of an output and a tap: all 9 of 5 x 4 outputs where zeros were written; else without the first and the last
    # row of taps, which meet padding once each.
    pairs = {"forward": 20 * 9, "backward": (5 * 3 - 2) * (4 * 3)}
    expected = 2 * 4 * 16 * 32 * (pairs["forward"] + 2 * pairs["backward"]) + 2 * 512 * 256 * 128
    assert hlo.Program(LIBRARY).flops() == {"library": expected}
    unknown = LIBRARY.replace("__cudnn$convForward", "__cudnn$other")
    assert hlo.Program(unknown).flops() == {"library": expected - 2 * 4 * 16 * 32 * pairs["forward"]}


def test_kernels_are_counted_as_often_as_they_start():
    assert hlo.Program(LIBRARY).kernels() == {"library": 4, "other": 3, "collective": 1}
    loop = """HloModule m

%body (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  %f = f32[8]{0} fusion(%p), kind=kCustom, calls=%inside, backend_config={"kind":"__triton_gemm"}
  %c = f32[8]{0} copy(%f)
}

%inside (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %d = f32[8]{0} add(%q, %q)
}

%cond (p.1: (s32[])) -> pred[] {
  ROOT %l = pred[] fusion(%p.1), kind=kLoop, calls=%inside
}

ENTRY %main (x: s32[]) -> (s32[]) {
  %w = (s32[]) while(%x), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %r = f32[8]{0} call(%w), to_apply=%body
}
"""
    assert hlo.Program(loop).kernels() == {"triton": 4, "other": 3 + 3 + 1}
    assert hlo.Program(loop.replace('"n":"3"', '"n":"7"')).kernels()["triton"] == 8


def test_what_a_step_should_not_do_is_seen():
    def found(f, x, **options):
        return faults(jax.jit(f, **options).lower(x).compile())

    x = jnp.ones((64, 64), jnp.float32)
    assert found(lambda x: x @ x, x, donate_argnums=0) == []
    assert found(lambda x: x @ x, x) == ["16384 bytes of outputs take no argument's place"]
    assert "a Fourier transform" in found(lambda x: jnp.fft.fft(x).real, x, donate_argnums=0)
    called = lambda x: jax.pure_callback(lambda a: a, jax.ShapeDtypeStruct(x.shape, x.dtype), x)  # noqa: E731
    assert found(called, x, donate_argnums=0) == ["a call of the host"]
    with jax.enable_x64():
        assert "float64" in found(lambda x: x @ x, jnp.ones((64, 64)), donate_argnums=0)


def test_all_families_are_among_the_programs():
    assert {program_config(name).model.name for name in PROGRAMS} == set(MODELS)


def test_topologies_of_several_hosts(monkeypatch):
    asked = []
    monkeypatch.setattr(plan, "cuda_plugin", lambda: "a plugin")
    monkeypatch.setattr(plan, "_described", lambda topology, compiler, platform, options: [asked.append(options)])
    for name in ("h100:3", "b200:8", "a100:16"):
        plan.topology_devices(chips.parse_topology(name))
    assert [options["topology"] for options in asked] == ["1x1x3", "1x1x8", "1x2x8"]
    assert "NVIDIA B200" in asked[1]["target_config"]
    with pytest.raises(UserError, match="h100:12: expected up to 8 GPUs, or a multiple"):
        plan.topology_devices(chips.parse_topology("h100:12"))


@NEEDED
@pytest.mark.nightly
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_family_compiles_for_an_h100(name):
    """Without float64, Fourier transforms, calls of the host or copies of the state: else the exit code is 1."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_compile.py"), f"--program={name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = re.search(rf"^\| {re.escape(name)} \| ([\d,]+)", done.stdout, re.MULTILINE)
    assert kernels is not None and int(kernels[1].replace(",", "")) > 50


@NEEDED
@pytest.mark.nightly
def test_a_plan_by_the_gpu_compiler():
    command = [sys.executable, "-m", "lipjax", "plan", "--config=configs/digits.py", "--topology=h100:8,cpu:8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in done.stdout.splitlines() if line[:1] == "|"}
    assert "Compiled by XLA for GPUs (jax-cuda1" in done.stdout and "stand-in" not in done.stdout
    assert 0.9 < float(rows["… times chips, over those traced"][0]) < 1.2
    parameters = float(rows["parameters"][0].split()[0]) * 1e6
    reduced = re.fullmatch(r" ([\d.]+) (KiB|MiB) ", rows["all-reduce per step"][0])
    assert reduced is not None
    assert float(reduced[1]) * {"KiB": 2**10, "MiB": 2**20}[reduced[2]] >= 4 * parameters * 0.99
