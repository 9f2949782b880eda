"""Compiling with less optimisation: tests compile for seconds what they run for milliseconds."""

import contextlib
import pathlib

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def quickly(directory: pathlib.Path | None = None):
    """Compiles with less optimisation, in about two thirds of the time.

    Args: directory: where to keep compiled programs, unless JAX_COMPILATION_CACHE_DIR says where, for all processes.
    """
    wanted = {"jax_disable_most_optimizations": True}
    move = directory is not None and jax.config.jax_compilation_cache_dir is None
    if move:
        wanted |= {
            "jax_compilation_cache_dir": str(directory),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
    before = {name: jax.config.values[name] for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    if move:
        compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        if move:
            compilation_cache.reset_cache()
