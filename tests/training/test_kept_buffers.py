"""Memory of batches is used again, but never while somebody can still read it: JAX on a CPU reads it in place."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiers import everyday

from lipjax.training.data import stream
from lipjax.training.data.kept_buffers import KeptBuffers

SHAPE = (8, 16, 16, 3)


def place(array):
    return array.ctypes.data


def test_memory_that_nobody_reads_is_taken_again():
    buffers = KeptBuffers(SHAPE)
    first = buffers.take()
    assert first.shape == SHAPE and first.dtype == np.uint8 and place(first) % 64 == 0
    where = place(first)
    second = buffers.take()
    assert place(second) != where and len(buffers) == 2
    del first
    assert place(buffers.take()) == where and len(buffers) == 2
    assert KeptBuffers((3,), np.float32).take().dtype == np.float32


@pytest.mark.parametrize("hold", [lambda a: a, lambda a: a[2:3], lambda a: a.reshape(-1)[5:].view(np.int8), memoryview])
def test_memory_that_somebody_holds_is_left_alone(hold):
    buffers = KeptBuffers(SHAPE)
    array = buffers.take()
    where, held = place(array), hold(array)
    del array
    other = buffers.take()
    assert place(other) != where
    del held, other
    assert place(buffers.take()) == where


@pytest.mark.parametrize("devices", everyday([1, 4], 1))
def test_arrays_of_jax_that_share_memory_keep_it(devices):
    """The hazard is real: the array of JAX lies where the batch lies. So it must hold, too, when the batch is gone."""
    split = NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("data",)), PartitionSpec("data"))
    buffers, arrays = KeptBuffers(SHAPE), []
    for number in range(5):
        batch = buffers.take()
        batch[...] = number
        arrays.append(jax.make_array_from_process_local_data(split, batch))
        del batch
    if devices == 1:
        batch = buffers.take()
        shared = jax.device_put(batch)
        assert shared.unsafe_buffer_pointer() == place(batch)  # control
        del batch, shared
    assert [int(array.min()) for array in arrays] == [int(array.max()) for array in arrays] == [0, 1, 2, 3, 4]
    made = len(buffers)
    del arrays
    gc.collect()
    jnp.zeros(1).block_until_ready()  # JAX drops its references at its next call
    for _ in range(10):
        buffers.take()
    assert len(buffers) == made


def test_work_that_is_still_to_be_done_sees_its_own_batch():
    """Steps are handed to the device before the ones before them are done, as in training."""
    split = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data"))

    @jax.jit
    def slow(x):
        mixed = x.reshape(8, -1)[:, :256].astype(jnp.float32) / 255
        held = jax.lax.fori_loop(0, 200, lambda _, m: m @ (mixed.T @ mixed) / 256, mixed)
        return x.astype(jnp.int32).min() + x.astype(jnp.int32).max() + 0 * held.astype(jnp.int32).sum()

    buffers, found = KeptBuffers(SHAPE), []
    for number in range(12):
        batch = buffers.take()
        batch[...] = number
        found.append(slow(jax.make_array_from_process_local_data(split, batch)))
        del batch
    assert [int(value) for value in found] == [2 * number for number in range(12)]


@pytest.mark.parametrize("pieces", [[1] * 11, [4, 4, 3], [11], [3, 8]])
def test_batches_are_the_same_from_any_pieces(pieces, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (11, 2, 2, 3), dtype=np.uint8)
    bounds = np.cumsum([0, *pieces])
    parts = [(images[a:b], np.arange(a, b)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]

    def decoded(*_):
        yield from parts

    monkeypatch.setattr(stream, "_decoded", decoded)
    whole = list(stream._batches(None, (4, 2, 2, 3), 0))
    assert len(whole) == 2  # what is no full batch is left
    batches = list(stream._batches(None, (4, 2, 2, 3), 0, steps=4))
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, -1], [-1] * 4]
    shown = np.concatenate([pixels for pixels, _ in batches])
    assert np.array_equal(shown[:11], images) and not shown[11:].any()
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(whole, batches, strict=False))
    places = {place(pixels) for pixels, _ in stream._batches(None, (4, 2, 2, 3), 0, steps=4)}
    assert len(places) <= 2  # the loop holds one while the next is made
