"""Compiled programs are kept where only the user writes, found again, and cost no run that they cannot be kept."""

import os
import pathlib
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from lipjax.training import compile_cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A user's cache directory; JAX knows of no other, and keeps whatever compiles."""
    before = {name: jax.config.values[name] for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache")}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.setattr(compile_cache, "MIN_COMPILE_SECONDS", 0.0)
    monkeypatch.setattr(compile_cache, "MIN_FREE_BYTES", 0)
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)


def compiled(number=1.5):
    """Compiles a program of its own name, and runs it."""

    def kept(x):
        return jnp.sin(x) * number

    return float(jax.jit(kept)(2.0))


def entries(cache):
    return sorted(cache.rglob("jit_kept-*-cache"))


def misses(action):
    """How many programs an action compiles that the cache lacked."""
    found = []

    def listen(event, **_):
        found.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        action()
    finally:
        jax._src.monitoring.unregister_event_listener(listen)
    return found.count("/jax/compilation_cache/cache_misses"), found.count("/jax/compilation_cache/cache_hits")


def test_a_program_is_kept_and_found_again_in_a_directory_of_the_user_alone(cache):
    with compile_cache.kept_programs():
        assert misses(compiled)[1] == 0
        directory = pathlib.Path(jax.config.values["jax_compilation_cache_dir"])
    assert directory == compile_cache.default_directory() and directory.parent == cache / "lipjax" / "jax"
    (entry,) = entries(cache)
    assert entry.parent == directory
    assert all(p.stat().st_mode & 0o777 == 0o700 for p in (directory, directory.parent, cache / "lipjax"))
    assert jax.config.values["jax_compilation_cache_dir"] is None
    with compile_cache.kept_programs():
        assert misses(compiled) == (0, 1)
    assert misses(compiled) == (0, 0)  # control: outside nothing is read
    compiled(2.5)
    assert entries(cache) == [entry]  # or written


@pytest.mark.parametrize("how", ["field", "directory", "empty", "switch", "config"])
def test_who_decides_otherwise_gets_that(cache, tmp_path, monkeypatch, how):
    if how in ("directory", "empty"):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own") if how == "directory" else "")
    if how == "switch":
        jax.config.update("jax_enable_compilation_cache", False)
    if how == "config":
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    given = jax.config.values["jax_compilation_cache_dir"]
    with compile_cache.kept_programs(how != "field"):
        assert jax.config.values["jax_compilation_cache_dir"] == given
    assert not cache.exists()


def test_programs_of_another_processor_lie_elsewhere(cache, monkeypatch):
    here = compile_cache.default_directory()
    assert here == compile_cache.default_directory()
    monkeypatch.setattr(compile_cache, "_processor", lambda: "another")
    assert compile_cache.default_directory().parent == here.parent
    assert compile_cache.default_directory() != here
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # which the standard says to ignore
    monkeypatch.setenv("HOME", "/home/somebody")
    assert compile_cache.default_directory().parent == pathlib.Path("/home/somebody/.cache/lipjax/jax")


@pytest.mark.parametrize("trouble", ["file", "writable by others", "full", "no home"])
def test_a_directory_that_cannot_be_used_costs_one_line(cache, monkeypatch, capsys, trouble):
    if trouble == "file":
        cache.write_text("")
        expected = "cannot be written"
    elif trouble == "writable by others":
        compile_cache.default_directory().mkdir(parents=True)
        compile_cache.default_directory().chmod(0o777)
        expected = "others may write there"
    elif trouble == "full":
        monkeypatch.setattr(compile_cache, "MIN_FREE_BYTES", 2**60)
        expected = "MiB are free there"
    else:
        monkeypatch.setattr(compile_cache, "default_directory", lambda: (_ for _ in ()).throw(RuntimeError("no HOME")))
        expected = "there is no home directory"
    with compile_cache.kept_programs():
        assert jax.config.values["jax_compilation_cache_dir"] is None
        assert compiled(3.5) == pytest.approx(3.5 * np.sin(2.0))
    error = capsys.readouterr().err
    assert error.startswith("Warning: compiled programs are not kept for later starts") and expected in error
    assert error.count("\n") == 1


def test_a_disk_that_fills_up_costs_one_line_and_leaves_no_half_program(cache, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with compile_cache.kept_programs():
        compiled()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # the first bytes of a file still get to the disk
        try:
            compiled(4.5)
            compiled(5.5)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert jax.config.values["jax_compilation_cache_dir"] is None
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "File too large" in error and "no longer kept" in error
    assert all(entry.stat().st_size > 100 for entry in entries(cache))


def test_a_program_that_was_cut_short_is_compiled_once_more_and_kept(cache, capsys):
    with compile_cache.kept_programs():
        compiled()
    (entry,) = entries(cache)
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    with compile_cache.kept_programs():
        assert misses(compiled) == (1, 0)
    assert entries(cache) == [entry] and entry.stat().st_size > len(whole) // 2
    with compile_cache.kept_programs():
        assert misses(compiled) == (0, 1)
    assert capsys.readouterr().err == ""


def test_the_oldest_programs_go_when_there_are_too_many(cache, monkeypatch):
    folder = compile_cache.default_directory()
    folder.mkdir(mode=0o700, parents=True)
    other = folder.parent / "another"
    other.mkdir()
    now = time.time()
    for age, place in enumerate((folder, other, folder, other)):
        file = place / f"jit_{age}-cache"
        file.write_bytes(bytes(100))
        os.utime(file, (now - 1000 * age, now - 1000 * age))
    monkeypatch.setattr(compile_cache, "MAX_BYTES", 400)
    with compile_cache.kept_programs():
        pass
    assert len(list(folder.parent.rglob("*-cache"))) == 4  # control: no more than may be
    monkeypatch.setattr(compile_cache, "MAX_BYTES", 399)
    with compile_cache.kept_programs():
        pass
    assert sorted(file.name for file in folder.parent.rglob("*-cache")) == ["jit_0-cache"]


@pytest.mark.parametrize("other", ["good", "bad", "unused", "another directory"])
def test_several_processes_share_one_directory_or_use_none(cache, monkeypatch, capsys, other):
    """This is process 0 of two; what the second one says is made up."""
    states = {"good": compile_cache._GOOD, "bad": compile_cache._BAD, "unused": compile_cache._UNUSED}
    exchanged = []

    def allgather(value):
        theirs = value.copy()
        if not exchanged:
            theirs[0] = states.get(other, compile_cache._GOOD)
            theirs[1:] = 0
        else:
            theirs[...] = other == "good"
        exchanged.append(value)
        return np.stack([value, theirs])

    monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with compile_cache.kept_programs():
        assert (jax.config.values["jax_compilation_cache_dir"] is not None) == (other == "good")
    assert len(exchanged) == 2 and exchanged[1].all() and not list(cache.rglob("seen-*"))
    error = capsys.readouterr().err
    assert error.count("\n") == (other in ("bad", "another directory"))
    assert ("process 1 cannot use" in error) == (other == "bad")
    assert ("do not share" in error) == (other == "another directory")


def test_processes_of_different_opinion_all_take_part(cache, monkeypatch):
    """Process 1 of two, which has a directory of its own, must not let process 0 wait for it."""
    calls = []
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda v: calls.append(v) or np.stack([v, v]))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with compile_cache.kept_programs():
        assert len(calls) == 2
    assert not cache.exists()
