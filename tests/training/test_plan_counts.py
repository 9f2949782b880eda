"""Counts that plans rest on: operations of traced programs, and operations and traffic of compiled ones."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lipjax.plan import flops, hlo
from lipjax.training import sharding


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
    parts = NamedSharding(mesh, PartitionSpec(sharding.axes(mesh, sharding.MODEL)))
    x = jax.device_put(jnp.ones((16, 32), jnp.float32), split)
    w = jax.device_put(jnp.ones((32, 32), jnp.float32), parts)
    found = compiled(lambda x, w: x.sum(0) + w[0], x, w, out_shardings=everywhere)
    assert found.num_devices == 8
    reduced = [c for c in found.collectives() if c.kind == "all-reduce"]
    assert (8, 32 * 4, 1) in [(c.group, c.bytes, c.times) for c in reduced]

    gather = lambda w: jax.lax.all_gather(w, sharding.axes(mesh, sharding.MODEL))  # noqa: E731
    gather = jax.shard_map(gather, mesh=mesh, in_specs=parts.spec, out_specs=PartitionSpec(), check_vma=False)
    assert [(c.kind, c.group, c.bytes) for c in compiled(gather, w).collectives()] == [("all-gather", 2, 32 * 32 * 4)]

    def often(x):
        step = lambda a: jax.lax.psum(jnp.sin(a), mesh.axis_names)  # noqa: E731
        return jax.lax.fori_loop(0, 5, lambda _, a: jax.lax.pcast(step(a), mesh.axis_names, to="varying"), x)

    looped = jax.shard_map(often, mesh=mesh, in_specs=split.spec, out_specs=split.spec)
    found = compiled(looped, x)
    assert [(c.kind, c.group, c.bytes, c.times) for c in found.collectives()] == [("all-reduce", 8, 2 * 32 * 4, 5)]
    assert found.collectives()[0].link_bytes() == 5 * 2 * 7 / 8 * 256
    assert found.collectives()[0].link_bytes(reduces_in_network=True) == 5 * 7 / 8 * 256

    axes = mesh.axis_names
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


# As libtpu writes an asynchronous gather that goes on beside what a loop computes, in each of its turns.
CHAIN = """HloModule jit_f, is_scheduled=true, replica_count=1, num_partitions=16

%start (s: f32[2,4]) -> (f32[2,4], f32[32,4], u32[]) {
  %s = f32[2,4]{1,0} parameter(0)
  %g.1 = f32[32,4]{1,0} all-gather(%s), channel_id=5, replica_groups=mesh['a'=16] {'a'}, metadata={op_name="f/w"}
  ROOT %begun = (f32[2,4], f32[32,4], u32[]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%beside (b: f32[2,4]) -> f32[32,4] {
  %b = f32[2,4]{1,0} parameter(0)
  ROOT %g.2 = f32[32,4]{1,0} all-gather(%b), channel_id=5, replica_groups=mesh['a'=16] {'a'}, metadata={op_name="f/w"}
}

%done (d: f32[2,4]) -> f32[32,4] {
  %d = f32[2,4]{1,0} parameter(0)
  %g.3 = f32[32,4]{1,0} all-gather(%d), channel_id=5, replica_groups=mesh['a'=16] {'a'}, metadata={op_name="f/w"}
  ROOT %ended = f32[32,4] custom-call(%g.3), custom_call_target="AsyncCollectiveDone"
}

%body (p: (f32[2,4])) -> (f32[2,4]) {
  %p = (f32[2,4]{1,0}) parameter(0)
  ROOT %f = (f32[2,4]) fusion(%p), kind=kOutput, calls=%beside
}

%both (r: (f32[2,4])) -> (f32[2,4]) {
  %r = (f32[2,4]{1,0}) parameter(0)
  %r.1 = (f32[2,4], f32[32,4], u32[]) fusion(%r), kind=kCustom, calls=%start
  %r.2 = (f32[2,4]) while(%r.1), body=%body, backend_config={"known_trip_count":{"n":"8"}}
  ROOT %r.3 = f32[32,4] fusion(%r.2), kind=kCustom, calls=%done
}

ENTRY %main (x: f32[2,4]) -> f32[32,4] {
  %x = f32[2,4]{1,0} parameter(0)
  ROOT %all = (f32[2,4]) call(%x), to_apply=%both
}
"""


# As libtpu writes a reduce-scatter of gradients.
SCATTERED = """HloModule jit_f, is_scheduled=true, replica_count=1, num_partitions=4

%all-reduce-scatter (input: f32[8,4]) -> f32[2,4] {
  %input = f32[8,4]{1,0:T(8,128)} parameter(0)
  %all-reduce.2 = f32[8,4]{1,0:T(8,128)} all-reduce(%input), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  %place = s32[]{:T(128)} partition-id()
  %zero = s32[]{:T(128)} constant(0)
  ROOT %kept = f32[2,4]{1,0} dynamic-slice(%all-reduce.2, %place, %zero), dynamic_slice_sizes={2,4}
}

ENTRY %main (x: f32[8,4]) -> f32[2,4] {
  %x = f32[8,4]{1,0} parameter(0)
  ROOT %fusion = f32[2,4]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
    (found,) = hlo.Program(SCATTERED).collectives()
    assert found == hlo.Collective("reduce-scatter", 4, 8 * 4 * 4, 1)
    assert found.link_bytes() == 3 / 4 * 128
    used = SCATTERED.replace("  ROOT %kept", "  %sum = f32[8,4]{1,0} add(%all-reduce.2, %all-reduce.2)\n  ROOT %kept")
    assert hlo.Program(used).collectives() == [hlo.Collective("all-reduce", 4, 8 * 4 * 4, 1)]  # all of it is read


def test_what_loops_carry_along_is_sent_once():
    assert [(c.kind, c.bytes, c.times) for c in hlo.Program(CHAIN).collectives()] == [("all-gather", 512, 1)]
    often = CHAIN.replace(
        "call(%x), to_apply=%both", 'while(%x), body=%both, backend_config={"known_trip_count":{"n":"3"}}'
    )
    assert [c.times for c in hlo.Program(often).collectives()] == [3]


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
