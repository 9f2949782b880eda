"""Training steps of single SOC layers (forward and backward, parametrisation included) in their three forms.

Run: python benchmarks/soc.py [--part=speed|forms] [--batch=64,128] [--depths=5,15] [--rounds=7] [--nokeep_memory]
  speed: the frequency domain against the spatial series of 5 terms, at 32x32x32 and 16x16x64.
  forms: at every layer shape of LipConvnet-5 ... 40 (arXiv:2108.04062), each form of the same circular function, and
    what `soc_frequency.choose_form` takes. With --terms=exact the function is the exponential, by as many
    terms as reach 1e-6 where there is no matrix function.
Medians of interleaved rounds in one process, on whatever device JAX finds. Spatial forms of more than
--max_spatial_gflop are left out: XLA's CPU convolution takes half a minute at 512 channels on a 2x2 map.

What the compiled step shows (XLA for CPU, float32, JAX 0.10.2; `jit(...).lower(...).compile().as_text()`):
  - no complex number and no FFT: all products are real, four of a complex one as a single product of (2 b x i) with
    (i x 2 o) per frequency. The exponential is one forward and one backward pass: nothing of it is computed twice.
  - the images are transposed once on the way in and once out, (b, h, w, c) <-> (w, h, b, c), channels staying in
    place, forward and backward; between such layers XLA keeps elementwise operations in that layout. The transforms
    are products of the pixels in place with small constant matrices, down to one product per side of the map. `_dft`
    tells JAX that spectrum and image are each other's adjoint: JAX's own transposes of such products put the pixels
    last, four more copies of all images per step.
  - FFTs instead (`jnp.fft.rfft2` with the transposes that it needs) took 3.4 times as long at 32x32x32, batch 64,
    and 1.8 times as long at 16x16x64: forward and backward, the blocks given.
  - no reshape merges the batch with an axis before it; one that does makes a batch spread over devices be gathered
    (tests/theory/test_dft.py).
  - splits rather than slices, whose transposes would be padded sums, are worth 5 to 20 % of the backward pass.
  - `skew_kernel` at 1024 channels takes 50 ms on two cores forward and as long backward: XLA fuses its transpose into
    a loop of strided reads. On a 1x1 map it would also add up the gradients of all terms there; a loop prevents it.
  - products of many small matrices run on one core: XLA's library for them (YNNPACK) divides a batch only within a
    matrix, from about 128 x 256 x 128 on; below, 40 to 90 GFLOP/s on a machine with 210. Products whose first factor is
    transposed go to another library (Eigen) and are slower: the backward pass of the series has none
    (`soc_frequency._series_by_parity`).
  - the temporary arrays of a step, more than 32 MB, go back to the system at its end and are cleared again at the
    next: page faults were a third of the step of 32x32x32, batch 64 (96 ms, 61 without), and hardly anything of the
    spatial series'. Hence memory.py, for all contenders; --nokeep_memory leaves it.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from memory import keep_freed_memory

from lipjax import conv
from lipjax.parametrize import soc, soc_forms, soc_frequency
from lipjax.spectral.series import terms_for

FLAGS = flags.FLAGS
flags.DEFINE_enum("part", "all", ["all", "speed", "forms"], "What is measured.")
flags.DEFINE_list("batch", ["64", "128"], "Batch sizes of the first part; the second takes the largest.")
flags.DEFINE_list("depths", ["5", "15"], "Depths of LipConvnet; from 15 on the shapes are the same.")
flags.DEFINE_enum("terms", "5", ["5", "exact"], "The function of the second part.")
flags.DEFINE_integer("rounds", 7, "Rounds; in each, every form runs once. Medians are shown.")
flags.DEFINE_bool("keep_memory", True, "Freed memory stays with the process: see memory.py.")
flags.DEFINE_float("max_spatial_gflop", 150, "Spatial forms with more arithmetic per step are left out.")

NORM = 0.7 * 3
"""The norm that normalisation to 0.7 promises for 3x3 kernels."""


def lipconvnet_shapes(depth: int) -> list[tuple[int, int, int, int]]:
    """(map side, channels in, channels out, kernel side) of every different SOC convolution of LipConvnet-`depth`."""
    shapes, side, channels = [], 32, 3
    for block in range(5):
        inner = 32 * 2**block
        for _ in range(depth // 5 - 1):
            shapes.append((side, channels, inner, 3))
            channels = inner
        side //= 2
        shapes.append((side, 4 * channels, 2 * inner, 3 if side > 1 else 1))
        channels = 2 * inner
    return list(dict.fromkeys(shapes))


def training_step(shape, batch: int, *, num_terms: int | None, form: str, padding: str = "CIRCULAR", fast=False):
    """A jitted step without arguments: outputs and gradients of raw kernel and images, for given cotangents."""
    side, c_in, c_out, k = shape
    m, in_shape = max(c_in, c_out), (side, side, c_in)
    rng = np.random.default_rng(0)
    raw, x, g = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((k, k, m, m), (batch, *in_shape), (batch, side, side, c_out))
    )
    vectors = jax.tree.map(lambda v: v.astype(jnp.float32), soc.init_vectors((k, k, m, m), jax.random.key(0)))
    _, vectors = jax.jit(soc.reshaped_norm, static_argnums=2)(conv.skew_kernel(raw), vectors, 20)

    def layer(raw, x, vectors):
        kernel = conv.skew_kernel(raw)
        sigma, _ = soc.reshaped_norm(kernel, vectors, 1)
        kernel = soc.normalize(kernel, sigma, NORM / k)
        for op in soc_forms.operators_of(
            kernel,
            in_shape,
            c_out,
            num_terms=num_terms,
            padding=padding,
            promised_norm=NORM,
            form=form,
            train=True,
            batch_size=batch,
            fast_gradient=fast,
        ):
            x = op(x)
        return x

    @jax.jit
    def step(raw, x, g, vectors):
        y, pull = jax.vjp(lambda raw, x: layer(raw, x, vectors), raw, x)
        return y, pull(g)

    return lambda: step(raw, x, g, vectors)


def medians(functions: dict) -> dict[str, float]:
    """Seconds by name, the functions taking turns."""
    times = {name: [] for name in functions}
    for round_number in range(FLAGS.rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if round_number:  # the first compiles
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def matrix_product_speed() -> float:
    """GFLOP/s of a product of 2048 x 2048 matrices in float32."""
    a = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(jnp.matmul)
    return 2 * 2048**3 / medians({"product": lambda: product(a, a)})["product"] / 1e9


def compare_domains() -> None:
    for side, c in ((32, 32), (16, 64)):
        for batch in map(int, FLAGS.batch):
            shape = side, c, c, 3
            found = medians(
                {
                    "spatial, zero padding": training_step(shape, batch, num_terms=5, form="spatial", padding="ZERO"),
                    "spatial, fast gradient": training_step(
                        shape, batch, num_terms=5, form="spatial", padding="ZERO", fast=True
                    ),
                    "spatial, circular": training_step(shape, batch, num_terms=5, form="spatial"),
                    "frequency, 5 terms": training_step(shape, batch, num_terms=5, form="response"),
                    "frequency, exponential": training_step(shape, batch, num_terms=None, form="response"),
                }
            )
            print(f"{side}x{side}x{c}, batch {batch}")
            for name, seconds in found.items():
                ratio = found["spatial, zero padding"] / seconds
                print(f"  {name:24s} {1e3 * seconds:9.1f} ms   {ratio:5.2f}x as fast as the spatial series")


def compare_forms() -> None:
    num_terms = None if FLAGS.terms == "exact" else 5
    batch, worst = max(map(int, FLAGS.batch)), 0.0
    shapes = list(dict.fromkeys(shape for depth in FLAGS.depths for shape in lipconvnet_shapes(int(depth))))
    terms = terms_for(NORM, 1e-6) if num_terms is None else num_terms
    print(f"\nforms of {'the exponential' if num_terms is None else '5 terms'}, circular, batch {batch}, in ms")
    for shape in shapes:
        side, c_in, c_out, k = shape
        m = max(c_in, c_out)
        args = (side, side), m, c_in, c_out, (k, k), batch
        chosen = soc_frequency.choose_form(*args, num_terms=num_terms, promised_norm=NORM)
        costs = soc_frequency.form_costs(*args, num_terms=num_terms, promised_norm=NORM)
        spatial = 6 * terms * batch * (side * k * m) ** 2 / 1e9
        forms = [form for form in costs if form != "spatial" or spatial <= FLAGS.max_spatial_gflop]
        found = medians({form: training_step(shape, batch, num_terms=num_terms, form=form) for form in forms})
        ratio = found[chosen] / min(found.values())
        worst = max(worst, ratio)
        shown = "  ".join(f"{form} {1e3 * seconds:8.1f}" for form, seconds in found.items())
        name = f"{side}x{side}, {c_in} -> {c_out}, {k}x{k}"
        print(f"  {name:28s} {shown}   takes {chosen}: {ratio:.2f}x the best", flush=True)
    print(f"  worst: {worst:.2f}x the best")


def main(argv):
    del argv
    if FLAGS.keep_memory:
        keep_freed_memory()
    device = jax.devices()[0].device_kind
    print(f"{device}, {os.cpu_count()} cores, jax {jax.__version__}, {matrix_product_speed():.0f} GFLOP/s (2048^3)")
    if FLAGS.part != "forms":
        compare_domains()
    if FLAGS.part != "speed":
        compare_forms()


if __name__ == "__main__":
    app.run(main)
