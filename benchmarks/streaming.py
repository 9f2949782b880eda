"""Images per second that one host reads, decodes and crops for ImageNet, by threads and by worker processes.

Run: python benchmarks/streaming.py [--workers=0,1,2] [--needed=IMAGES_PER_SECOND_AND_HOST_OF_THE_PLAN]
The images are made up, of ImageNet's sizes (500 x 375 pixels, JPEG of quality 90, about 110 kB), and go the way of the
real ones: archives, TFDS's builder, array_record files, Grain. Under two minutes on two cores.
"""

import io
import os
import pathlib
import tarfile
import tempfile
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import dataclasses

import numpy as np
from absl import app, flags, logging
from PIL import Image

from lipjax.training.data import StreamDataset, jpeg, prepared, stream
from lipjax.training.data.kept_buffers import KeptBuffers
from lipjax.training.data.prepare import prepare

FLAGS = flags.FLAGS
flags.DEFINE_list("workers", ["0", "1", "2"], "Numbers of worker processes; 0: threads of this process.")
flags.DEFINE_integer("images", 512, "Images made up.")
flags.DEFINE_integer("batch", 64, "Images of a batch.")
flags.DEFINE_float("seconds", 10.0, "Of each measurement.")
flags.DEFINE_float("needed", 0.0, "Images per second that a host has to deliver (python -m lipjax plan).")

CLASSES = ("n01440764", "n01739381")


def photograph(generator: np.random.Generator, quality: int = 90) -> bytes:
    """A JPEG with detail at all scales, as much as makes it as large as one of ImageNet's."""
    width, height = (500, 375) if generator.random() < 0.8 else (375, 500)
    total = np.zeros((height, width, 3))
    for octave in range(2, 10):
        noise = generator.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(layer, float) / 1.1**octave
    scaled = np.clip((total - total.mean()) / total.std() * 60 + 128, 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(scaled.astype(np.uint8)).save(buffer, "jpeg", quality=quality)
    return buffer.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    archive.addfile(header, io.BytesIO(content))


def made_up_imagenet(data_dir: pathlib.Path, count: int) -> tuple[StreamDataset, float]:
    """The data set as training opens it, and the mean size of its images in bytes."""
    folder = data_dir / "downloads" / "manual"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    sizes = []
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as train:
        for number, name in enumerate(CLASSES):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as images:
                for index in range(number, count, len(CLASSES)):
                    content = photograph(generator)
                    sizes.append(len(content))
                    add(images, f"{name}_{index}.JPEG", content)
            add(train, f"{name}.tar", inner.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as test:
        add(test, "ILSVRC2012_val_00000001.JPEG", photograph(generator))
    prepared.PREPARED["imagenet"] = dataclasses.replace(prepared.PREPARED["imagenet"], train=count, test=1)
    prepare("imagenet", data_dir, download=False)
    sources, names = prepared.open_prepared("imagenet", data_dir)
    return StreamDataset("imagenet", sources, len(names), 224), float(np.mean(sizes))


def of_one_core(encoded: list[bytes], size: int = 224) -> dict[str, float]:
    """Images per second of one core's own time, the best of five rounds each: ways to decode and crop."""
    rates = {}
    for resample in stream.RESAMPLE:
        for decoder in ("Pillow", "simplejpeg"):
            kept = jpeg.decoded
            if decoder == "Pillow":
                jpeg.decoded = lambda encoded: None
            try:
                rounds = []
                for _ in range(5):
                    generator, start = np.random.default_rng(0), time.process_time()
                    for content in encoded:
                        stream.random_crop(content, size, generator, "", resample)
                    rounds.append(time.process_time() - start)
            finally:
                jpeg.decoded = kept
            rates[f"{decoder}, {resample}"] = len(encoded) / min(rounds)
    return rates


def stacking(batch: int = 1024, size: int = 224) -> dict[str, float]:
    """Images per second of one core's own time, the best of five rounds: ways to make a batch of decoded images."""
    images = [np.full((size, size, 3), i % 256, np.uint8) for i in range(batch)]
    buffers = KeptBuffers((batch, size, size, 3))

    def kept():
        array = buffers.take()
        for place, image in enumerate(images):
            array[place] = image

    rates = {}
    for name, function in (("a new array", lambda: np.stack(images)), ("kept memory", kept)):
        rounds = []
        for _ in range(6):
            start = time.process_time()
            function()
            rounds.append(time.process_time() - start)
        rates[name] = batch / min(rounds[1:])
    return rates


def rate(dataset: StreamDataset) -> tuple[float, float]:
    """(seconds until the first batch, images per second from then on)."""
    start = time.perf_counter()
    batches = dataset.train_batches(FLAGS.batch, seed=0)
    next(batches)
    first, count = time.perf_counter(), 0
    # What was decoded in advance is no measure of speed.
    for _ in range(2 * stream.NUM_THREADS * stream.CHUNK // FLAGS.batch):
        next(batches)
    begin = time.perf_counter()
    while time.perf_counter() - begin < FLAGS.seconds:
        next(batches)
        count += FLAGS.batch
    seconds = time.perf_counter() - begin
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    return first - start, count / seconds


def main(_):
    logging.set_verbosity(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        dataset, size = made_up_imagenet(pathlib.Path(folder), FLAGS.images)
        print(f"{FLAGS.images} images of {size / 1e3:.0f} kB in the mean, {os.cpu_count()} cores")
        records = dataset.splits["train"]
        rates = of_one_core([records[i]["image"] for i in range(min(len(records), 100))])
        core = rates["simplejpeg, bilinear"]
        print("images per second of one core's own time:")
        for name, found in rates.items():
            print(f"  decode and crop, {name:22} {found:7.0f}  {found / rates['Pillow, bilinear']:.2f}")
        for name, found in stacking().items():
            print(f"  put 1024 of them into {name:16} {found:7.0f}")
        for workers in map(int, FLAGS.workers):
            wait, found = rate(dataclasses.replace(dataset, workers=workers))
            name = f"{workers} processes" if workers else f"{stream.NUM_THREADS} threads"
            needed = f", {FLAGS.needed / found:.1f} hosts like this for one of the plan's" if FLAGS.needed else ""
            print(f"{name:<12} {found:7.0f} images/s, first batch after {wait:.1f} s{needed}", flush=True)
        if FLAGS.needed:
            print(f"{FLAGS.needed:.0f} images/s take {FLAGS.needed / core:.0f} cores at least")


if __name__ == "__main__":
    app.run(main)
