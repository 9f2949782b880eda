"""XLA's alarm about slow compilation does not reach the user; everything else on standard error does."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
from tiers import everyday

ROOT = pathlib.Path(__file__).resolve().parents[2]
START = """
import contextlib, os, sys, time
from lipjax.training.compile_alarm import no_slow_compile_alarm
write = lambda text: os.write(2, text.encode())
"""
# What XLA writes after two minutes of compilation, and when that compilation is over.
ALARM = """E1130 06:23:23.655107     371 slow_operation_alarm.cc:73]
********************************
[Compiling module jit_step] Very slow compile? If you want to file a bug, run with envvar XLA_FLAGS=--xla_dump_to=/tmp/foo and attach the results.
********************************
"""  # noqa: E501
OVER = ALARM.replace(":73]\n", ":140] The operation took 2m29.0445135s\n\n")
# Constants are folded slowly enough for a real alarm within seconds.
REAL = """
import jax, jax.numpy as jnp
@jax.jit
def f(x):
    ones = jnp.zeros((120, 120)) + 1.0
    return x + jnp.sum(jax.lax.reduce_window(ones, 0.0, jax.lax.add, (40, 40), (1, 1), "SAME"))
f(1.0).block_until_ready()
"""


def run(code, **environment):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", **environment}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-c", START + code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def inside(code):
    return "with no_slow_compile_alarm():\n" + "".join(f"    {line}\n" for line in code.strip().splitlines())


@pytest.mark.nightly  # how long XLA takes, and so whether it alarms, depends on the machine
def test_a_real_alarm_is_dropped(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)  # what was compiled before does not alarm
    code = f"{REAL}\nwrite('a real error\\n')"
    alarmed = run(code)
    assert "slow_operation_alarm.cc" in alarmed.stderr and "attach the results" in alarmed.stderr  # control
    assert (run(inside(code)).stderr, alarmed.returncode) == ("a real error\n", 0)


def test_alarms_are_dropped_and_nothing_else_is():
    stars = "********************************\n"
    text = f"first\n{ALARM}{OVER}E1130 cuda_dnn.cc:1] Loaded runtime CuDNN\n{ALARM}{stars}last\n"
    done = run(inside(f"write({text!r})") + "write('outside\\n')")
    assert done.stderr == f"first\nE1130 cuda_dnn.cc:1] Loaded runtime CuDNN\n{stars}last\noutside\n"
    assert done.stdout == "" and done.returncode == 0


def test_a_program_is_not_said_to_miss_what_is_no_feature_of_a_processor():
    about = "E1130 cpu_aot_loader.cc:195] Loading XLA:CPU AOT result. Target machine feature {} is not supported ...\n"
    real = about.format("+avx512f")
    text = about.format("+prefer-no-gather") + real + about.format("+prefer-no-scatter")
    assert run(inside(f"write({text!r})")).stderr == real


def test_text_that_only_begins_like_an_alarm_is_not_lost_for_long():
    lines = "".join(f"line {i}\n" for i in range(40))
    done = run(inside(f"write({'slow_operation_alarm.cc:9] x' + chr(10) + lines!r})"))
    assert done.stderr.endswith("line 38\nline 39\n") and done.stderr.count("\n") >= 10


def test_the_last_words_of_an_aborted_process_are_passed_on():
    done = run(inside(f"write({ALARM!r})\nwrite('F1130 client.h:80] Terminating process\\nno line')\nos.abort()"))
    assert done.stderr == "F1130 client.h:80] Terminating process\nno line"
    assert done.returncode == -signal.SIGABRT
    done = run(inside("print('said', file=sys.stderr)\nsys.exit(3)"))
    assert (done.stderr, done.returncode) == ("said\n", 3)
    done = run(inside("raise ValueError('no')"))
    assert done.stderr.rstrip().endswith("ValueError: no") and done.returncode == 1


def test_a_question_is_shown_before_its_line_ends():
    code = inside("write('password: ')\ntime.sleep(3)\nwrite('done')")
    with subprocess.Popen([sys.executable, "-c", START + code], cwd=ROOT, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert os.read(process.stderr.fileno(), 100) == b"password: "
        assert process.communicate()[1] == b"done"
    assert process.returncode == 0


def test_ctrl_c_does_not_silence_the_rest():
    code = "with contextlib.suppress(KeyboardInterrupt):\n    os.killpg(0, 2)\n    time.sleep(9)\nwrite('saved')"
    command = [sys.executable, "-c", START + inside(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, start_new_session=True)
    assert (done.stderr, done.returncode) == ("saved", 0)


@pytest.mark.parametrize("missing", everyday(["standard error", "a process"], "standard error"))
def test_without_a_filter_all_goes_on(missing):
    break_it = "os.close(2)" if missing == "standard error" else "sys.executable = '/nowhere/python'"
    done = run(f"{break_it}\n" + inside("print('works')"))
    assert (done.stdout, done.returncode) == ("works\n", 0)
