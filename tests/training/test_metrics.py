"""Metrics: every number arrives once, whole, and in order, also over a resume and a full disk."""

import io
import json
import math
import re

import jax.numpy as jnp
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c

from lipjax.errors import UserError
from lipjax.training.metrics import FILE_NAME, MetricWriter, validation_metrics
from lipjax.training.terminal import Terminal, progress_of

pytestmark = pytest.mark.quick_compiles


def read(workdir):
    return [json.loads(line) for line in (workdir / FILE_NAME).read_text().splitlines()]


def board_scalars(workdir):
    """(step, tag, value) of all event files, read by the record format's own definition: length, crc, data, crc."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            assert int.from_bytes(data[at + 8 : at + 12], "little") == masked_crc32c(data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 16 + length
    return found


def test_one_line_per_write_and_the_same_in_tensorboard(tmp_path, precision):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": jnp.float32(0.5), "margin_estimate": 2})
        assert len(read(tmp_path)) == 1  # flushed: a killed process loses nothing
        writer.write(2, {"loss": float("nan"), "accuracy": 0.25}, split="validation")
    assert read(tmp_path) == [
        {"step": 1, "split": "train", "loss": 0.5, "margin_estimate": 2.0},
        {"step": 2, "split": "validation", "loss": None, "accuracy": 0.25},
    ]
    assert board_scalars(tmp_path) == [
        (1, "train/loss", 0.5),
        (1, "train/margin_estimate", 2.0),
        (2, "validation/accuracy", 0.25),
    ]


def test_a_resumed_run_has_no_step_twice(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": 1.0 / step})
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"step": 6, "spl')  # killed while writing
    with MetricWriter(tmp_path, resume_step=3) as writer:
        for step in (4, 5, 6):
            writer.write(step, {"loss": 10.0})
    assert [(line["step"], line["loss"] == 10.0) for line in read(tmp_path)] == [
        (step, step > 3) for step in range(1, 7)
    ]
    with MetricWriter(tmp_path) as writer:  # control: a run that starts anew keeps nothing
        writer.write(1, {"loss": 0.0})
    assert len(read(tmp_path)) == 1


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    output = io.StringIO()
    with MetricWriter(tmp_path / "run", console=Console(file=output)) as writer, writer.progress(2) as progress:
        writer.write(1, {"loss": 1.0})
        progress.step(1, loss=1.0)
        progress.epoch(1, 1, {"loss": 1.0})
    assert not (tmp_path / "run").exists() and output.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_plain_lines_elsewhere(tmp_path, terminal):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=200)
    with MetricWriter(tmp_path, console=console) as writer, writer.progress(10, first_step=5) as progress:
        progress.step(10, loss=0.125, accuracy=0.75)
        progress.epoch(2, 2, {"loss": 0.125, "certified_accuracy_estimate": 0.5, "val_accuracy": 0.5})
    text = output.getvalue()
    if terminal:
        assert "10/10" in text and "accuracy 0.75" in text and "\x1b[" in text
        assert "epoch 2/2  validation: accuracy 0.5" in text and "loss 0.125  certified" not in text
    else:
        assert text == "epoch 2/2  loss 0.125  certified_accuracy_estimate 0.5  val_accuracy 0.5\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_many_epochs_have_a_line_for_every_tenth_in_a_pipe_and_none_in_a_terminal(tmp_path, terminal):
    for count, first, expected in (
        (100, 0, list(range(1, 101))),
        (305, 0, [1, *range(10, 301, 10), 305]),
        (305, 296, [297, 300, 305]),  # a run that goes on: its first one, too
    ):
        output = io.StringIO()
        console = Console(file=output, force_terminal=terminal, width=200)
        with MetricWriter(tmp_path, console=console) as writer, writer.progress(count, first) as progress:
            for epoch in range(first, count):
                progress.epoch(epoch + 1, count, {"loss": 1.0})
        lines = [int(epoch) for epoch in re.findall(r"^epoch (\d+)/", output.getvalue(), re.MULTILINE)]
        assert lines == ([] if terminal else expected)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_quiet_terminal_shows_warnings_and_results_alone(tmp_path, terminal):
    (tmp_path / FILE_NAME).write_text('{"step": 1}\nno json\n')
    output = io.StringIO()
    console = Terminal(quiet=True, file=output, force_terminal=terminal, width=300)
    with MetricWriter(tmp_path, console=console, resume_step=1) as writer, writer.progress(10) as progress:
        with progress.compiling("the step"):
            progress.step(1, loss=1.0)
        progress.epoch(1, 1, {"loss": 1.0})
    console.print("the table")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    assert re.fullmatch(r".*metrics.jsonl is damaged in line 2, left out .*\nthe table\n", text)
    loud = Terminal(file=io.StringIO())  # control
    assert progress_of(loud) is loud and progress_of(console) is not console


@pytest.mark.parametrize("terminal", [True, False])
def test_compiling_is_said_before_and_how_long_it_took_after(tmp_path, terminal):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120)
    with MetricWriter(tmp_path, console=console) as writer, writer.progress(10) as progress:
        with progress.compiling("the step"):
            if not terminal:
                assert output.getvalue() == "Compiling the step ..."
        progress.epoch(1, 1, {"loss": 1.0})
        with pytest.raises(KeyboardInterrupt), progress.compiling("it again"):
            raise KeyboardInterrupt
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    assert re.search(r"Compiling the step \.\.\. \d+\.\d s\n", text)
    if terminal:
        assert "training" in text
    else:
        assert re.fullmatch(r"Compiling the step \.{3} \d+\.\d s\nepoch 1/1  loss 1\nCompiling it again \.{3}\n", text)


def test_what_was_validated_at_a_step_is_found(tmp_path):
    assert validation_metrics(tmp_path, 1) is None
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"accuracy": 0.5}, "validation")
        writer.write(2, {"accuracy": 0.75}, "train")
        writer.write(2, {"accuracy": 0.25, "loss": math.nan}, "validation")
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(b"\xff\n[1]\n{")
    assert validation_metrics(tmp_path, 2) == {"accuracy": 0.25, "loss": None}
    assert validation_metrics(tmp_path, 1) == {"accuracy": 0.5} and validation_metrics(tmp_path, 3) is None


def test_a_metric_cannot_hide_the_step(tmp_path):
    with MetricWriter(tmp_path) as writer, pytest.raises(ValueError, match="'step'"):
        writer.write(1, {"step": 2.0})


class FullDisk(io.StringIO):
    def flush(self):
        raise OSError(28, "No space left on device")


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"{FILE_NAME}.*No space left.*free some space"):
        with MetricWriter(tmp_path) as writer:
            writer._file.close()
            monkeypatch.setattr(writer, "_file", FullDisk())
            writer.write(1, {"loss": 1.0})


def test_a_workdir_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --workdir"):
        MetricWriter(tmp_path / "file" / "run")
