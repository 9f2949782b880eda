"""A standard output that fails: the command goes on, says so once, and writes its files."""

import contextlib
import io
import os
import sys

import pytest
from rich.console import Console
from training_helpers import quick_compiles, tiny_config  # noqa: F401  quick_compiles is a fixture

from lipjax import __main__ as program
from lipjax import run, streams
from lipjax.errors import UserError, run_command
from lipjax.training.loop import load_best

SAID = "The standard output cannot be written any more ({}): the command goes on without it and writes its files.\n"


@contextlib.contextmanager
def output(kind):
    """sys.stdout as a pipe that nobody reads, or a device that is full. Block-buffered, as it is in a pipe."""
    if kind == "no reader":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    before, sys.stdout = sys.stdout, os.fdopen(writer, "w", encoding="utf-8")
    try:
        yield
    finally:
        sys.stdout.close()  # raises if something is left that cannot be written
        sys.stdout = before


@pytest.mark.parametrize(("kind", "reason"), [("no reader", "Broken pipe"), ("full", "No space left on device")])
@pytest.mark.parametrize("printer", ["print", "rich"])
def test_a_command_whose_reader_is_gone_goes_on(kind, reason, printer, capsys):
    done = []

    def command():
        for number in range(20):
            if printer == "rich":
                Console().print("x" * 1000)
            else:
                print("x" * 1000, flush=number % 2 == 0)
            done.append(number)

    with output(kind):
        assert run_command(command, "interrupted") == 0
        print("of nobody's interest", flush=True)  # nor does what follows fail
    assert len(done) == 20 and capsys.readouterr().err == SAID.format(reason)


def test_what_is_left_in_the_buffer_does_not_fail_either(capsys):
    with output("no reader"):
        assert run_command(lambda: print("short"), "interrupted") == 0
    assert capsys.readouterr().err == SAID.format("Broken pipe")
    with pytest.raises(BrokenPipeError), output("no reader"):  # control
        print("short")


def test_an_error_is_still_an_error(capsys):
    def command():
        print("x", flush=True)
        raise UserError("of the config")

    with output("no reader"):
        assert run_command(command, "interrupted") == 2
    assert capsys.readouterr().err == SAID.format("Broken pipe") + "Error: of the config\n"


def test_a_standard_error_that_is_gone_does_not_matter(capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as gone:
        monkeypatch.setattr(sys, "stderr", gone)

        def command():
            print("a warning", file=sys.stderr)
            print("an epoch")

        assert run_command(command, "interrupted") == 0
        monkeypatch.undo()
    assert capsys.readouterr().out == "an epoch\n"


def test_streams_that_a_process_was_started_without(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run_command(lambda: print("to nobody"), "interrupted") == 0
    assert sys.stdout is None


def test_letters_that_a_locale_has_no_code_for(monkeypatch):
    raw = io.BytesIO()
    with monkeypatch.context() as patch:
        ascii_only = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
        patch.setattr(sys, "stdout", ascii_only)
        text = "0.82 ± 0.01, l₂ ≤ 36/255 … of Läufe"
        assert run_command(lambda: (Console().print(text), print(text)), "interrupted") == 0
        with pytest.raises(UnicodeEncodeError):  # control
            print(text)
    assert raw.getvalue() == b"0.82 ? 0.01, l? ? 36/255 ? of L?ufe\n" * 2
    ascii_only.close()


def test_guards_are_put_up_once_and_taken_away():
    before = sys.stdout
    with streams.guarded():
        outer = sys.stdout
        with streams.guarded():
            assert sys.stdout is outer is not before
        assert sys.stdout is outer
    assert sys.stdout is before


@pytest.mark.parametrize("code", [0, 1])
def test_a_check_that_nobody_reads_says_what_it_found(monkeypatch, capsys, code):
    monkeypatch.setattr(program.checker, "run", lambda *_: (print("x", flush=True), code)[1])
    with output("no reader"):
        assert program.main(["check", "somewhere"]) == code
    assert capsys.readouterr().err == SAID.format("Broken pipe")


@pytest.mark.parametrize("line", ["--help", "train --help", "train --config=liresnet:help", "check -h"])
def test_a_help_text_that_nobody_reads_to_its_end_is_no_error(line, capsys):
    """lipjax train --help | head -1."""

    def called():
        try:
            return program.main(line.split()) or 0
        except SystemExit as end:
            return end.code or 0

    with output("no reader"):
        assert called() == 0
    assert capsys.readouterr() == ("", "")
    assert called() == 0 and len(capsys.readouterr().out) > 100  # control: whoever reads gets it all


@pytest.mark.x64_off
def test_a_run_whose_reader_is_gone_is_trained_and_certified(tmp_path, capsys, monkeypatch):
    def certify_run(workdir, config, seed, trained, console):
        console.print("Certifying ...")
        return {"step": load_best(workdir, trained)[2]}

    monkeypatch.setattr(run, "certify_run", certify_run)
    monkeypatch.setattr(run.reports, "print_table", lambda report, console: console.print(report))
    found = []
    with output("no reader"):
        assert run_command(lambda: found.append(run.run(tiny_config(), tmp_path)), "interrupted") == 0
    assert capsys.readouterr().err == SAID.format("Broken pipe")
    assert found[0]["step"] > 0 and (tmp_path / "metrics.jsonl").read_text().count("\n") == 6
