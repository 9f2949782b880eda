"""Image files of users: formats, transparency, grey among colour, what is ignored, resizing, classes without a test."""

import warnings

import numpy as np
import pytest
from data_helpers import data_config, load_arrays, random_images, rows
from PIL import Image

from lipjax.errors import UserError
from lipjax.training.data import Split, images


def write_folder(root, classes=2, count=6, shape=(6, 6, 3), seed=0):
    """class_0/000.png …; returns the config, the pixels and the labels."""
    pixels, labels = random_images(classes * count, *shape, seed=seed), np.repeat(np.arange(classes), count)
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        file = root / f"class_{label}" / f"{index:03}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(file)
    return data_config("folder", path=str(root)), pixels, labels.astype(np.int32)


def everything(dataset):
    return rows(dataset.train, dataset.validation, dataset.test)


# ---- formats


@pytest.mark.parametrize("suffix", ["bmp", "webp", "tiff", "TIF", "png"])
def test_formats_without_loss_are_read_as_they_were_written(tmp_path, suffix):
    config, pixels, labels = write_folder(tmp_path)
    for file in sorted(tmp_path.rglob("*.png")):
        image = Image.open(file)
        image.load()
        file.unlink()
        image.save(file.with_suffix(f".{suffix}"), **({"lossless": True} if suffix == "webp" else {}))
    dataset = load_arrays(config)
    assert everything(dataset) == rows(Split(pixels, labels)) and dataset.notes == ()


def test_what_is_not_read_is_counted_and_nested_folders_are_named(tmp_path):
    config, pixels, labels = write_folder(tmp_path)
    for name in ("class_0/a.gif", "class_0/b.gif", "class_1/notes.txt", "README", "class_1/.hidden", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("class_1/more", "class_0/old"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels[0]).save(tmp_path / name / "lost.png")
    dataset = load_arrays(config)
    assert everything(dataset) == rows(Split(pixels, labels))
    assert dataset.notes == (
        f"Not read in {tmp_path}: 4 files (2 .gif, 1 .txt, 1 without an ending) and 2 nested folders (class_0/old, "
        "class_1/more).",
    )
    for file in (tmp_path / "class_1").glob("*.png"):
        file.unlink()
    with pytest.raises(UserError, match=r"class_1 holds no image but 1 file \(1 .txt\) and 1 nested folder .*more"):
        load_arrays(config)


def test_a_file_of_several_images_is_refused_but_not_a_cameras_preview(tmp_path):
    config, pixels, _ = write_folder(tmp_path)
    first, second = (Image.fromarray(image) for image in pixels[:2])
    file = tmp_path / "class_0" / "many.tiff"
    first.save(file, save_all=True, append_images=[second])
    with pytest.raises(UserError, match="many.tiff holds 2 images"):
        load_arrays(config)
    file.unlink()
    first.save(tmp_path / "class_0" / "photo.jpg", "MPO", save_all=True, append_images=[second])
    assert len(everything(load_arrays(config))) == 13


def test_damaged_files_of_every_format_are_named(tmp_path):
    config, pixels, _ = write_folder(tmp_path)
    for suffix in images.SUFFIXES:
        file = tmp_path / "class_1" / f"half{suffix}"
        Image.fromarray(random_images(1, 40, 40, 3)[0]).save(file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about TIFF
            with pytest.raises(UserError, match=f"half{suffix} is not a readable image"):
                load_arrays(config)
        file.unlink()
    assert len(everything(load_arrays(config))) == 12  # control


# ---- transparency, grey and colour


def test_transparent_pixels_are_put_onto_white(tmp_path):
    colour = np.array([10, 200, 90])
    for alpha in (0, 51, 255):
        pixels = np.full((2, 3, 4), (*colour, alpha), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        found = images.read_image(tmp_path / "a.png")
        expected = (alpha * colour + (255 - alpha) * 255) / 255
        np.testing.assert_allclose(found.pixels, np.broadcast_to(expected, (2, 3, 3)), atol=0.51)
        assert found.composited == (alpha < 255)
    # Also of grey images, of palettes, and where one colour of a file means transparency.
    Image.fromarray(np.full((2, 3, 2), (100, 0), np.uint8)).save(tmp_path / "la.png")
    grey = Image.fromarray(np.array([[7, 90, 7]], np.uint8))
    grey.save(tmp_path / "l.png", transparency=7)
    grey.convert("P").save(tmp_path / "p.png", transparency=7)
    assert np.array_equal(images.read_image(tmp_path / "la.png").pixels, np.full((2, 3), 255))
    for name in ("l.png", "p.png"):
        found = images.read_image(tmp_path / name)
        assert found.composited and np.array_equal(found.pixels, [[255, 90, 255]])


def test_composited_images_are_counted(tmp_path):
    config, pixels, labels = write_folder(tmp_path)
    opaque, clear = (np.concatenate([pixels[0], np.full((6, 6, 1), a, np.uint8)], axis=2) for a in (255, 254))
    Image.fromarray(opaque).save(tmp_path / "class_0" / "000.png")
    dataset = load_arrays(config)
    assert dataset.notes == () and everything(dataset) == rows(Split(pixels, labels))
    Image.fromarray(clear).save(tmp_path / "class_0" / "000.png")
    assert load_arrays(config).notes == ("Transparent in part, and put onto white: 1 of 12 images (class_0/000.png).",)


def test_grey_images_stay_grey_with_an_alpha_channel_or_a_palette(tmp_path):
    config, pixels, labels = write_folder(tmp_path, shape=(6, 6))
    Image.fromarray(np.stack([pixels[0], np.full((6, 6), 255, np.uint8)], axis=2)).save(tmp_path / "class_0/000.png")
    Image.fromarray(pixels[1]).convert("P").save(tmp_path / "class_0/001.png")
    for index, mode in enumerate(("LA", "P", "L")):  # control: so they lie there
        with Image.open(tmp_path / f"class_0/00{index}.png") as image:
            assert image.mode == mode
    dataset = load_arrays(config)
    assert dataset.image_shape == (6, 6, 1) and dataset.notes == ()
    assert everything(dataset) == rows(Split(pixels[..., None], labels))


def test_files_that_disagree_about_colour_are_named(tmp_path):
    config, pixels, _ = write_folder(tmp_path, shape=(6, 6))
    palette = Image.fromarray(random_images(1, 6, 6, 3)[0]).quantize(8)
    palette.save(tmp_path / "class_1" / "odd.png")
    dataset = load_arrays(config)
    assert dataset.image_shape == (6, 6, 3)
    assert dataset.notes == ("All images became RGB, because they disagree. In colour: 1 of 13 (class_1/odd.png).",)
    for index in range(6, 12):
        palette.save(tmp_path / "class_1" / f"{index:03}.png")
    for name in ("a", "b"):
        palette.save(tmp_path / "class_0" / f"{name}.png")
    assert load_arrays(config).notes == (
        "All images became RGB, because they disagree. Grey: 6 of 15 (class_0/000.png, class_0/001.png, "
        "class_0/002.png and 3 more).",
    )


# ---- sizes


def test_resizing_takes_the_centre_square_and_averages():
    steps = np.arange(12, dtype=np.uint8).reshape(2, 6) * 20
    assert images.resize(np.repeat(steps[:1], 2, axis=0), 1).shape == (1, 1)
    # Of 2 x 6 pixels the centre 2 x 2 remain, whose mean is exact: a triangle around the middle of four equal weights.
    assert images.resize(steps, 1)[0, 0] == steps[:, 2:4].mean()
    assert images.resize(steps.T, 1)[0, 0] == steps[:, 2:4].mean()
    same = random_images(1, 5, 5, 3)[0]
    assert images.resize(same, 5) is same
    # Constant images stay constant, whatever the number of channels, and channels do not mix.
    for channels in (1, 2, 3, 4):
        constant = np.broadcast_to(np.arange(1, channels + 1, dtype=np.uint8) * 50, (9, 7, channels))
        assert np.array_equal(images.resize(constant, 4), np.broadcast_to(constant[0, 0], (4, 4, channels)))
    # An independent oracle for a factor of two: the triangle filter of support 2 has these weights inside.
    ramp = random_images(1, 8, 8)[0].astype(float)
    inner = np.array([1, 3, 3, 1]) / 8
    expected = inner @ ramp[1:5, 1:5] @ inner
    assert abs(images.resize(ramp.astype(np.uint8), 4)[1, 1] - expected) <= 1  # Pillow rounds once for each direction
    assert abs(ramp[2:4, 2:4].mean() - expected) > 2  # control: not the plain mean of 2 x 2


def test_image_size_makes_a_folder_of_many_sizes_one(tmp_path):
    config, pixels, labels = write_folder(tmp_path)
    wide = random_images(1, 12, 20, 3)[0]
    Image.fromarray(wide).save(tmp_path / "class_0" / "wide.png")
    with pytest.raises(UserError, match=r"wide.png is \(12, 20\) .* config.data.image_size say to how many pixels"):
        load_arrays(config)
    config.image_size = 6
    dataset = load_arrays(config)
    expected = Split(np.stack([*pixels, images.resize(wide, 6)]), np.append(labels, np.int32(0)))
    assert everything(dataset) == rows(expected)
    assert dataset.name == f"folder:{tmp_path.name}, resized to 6 x 6"
    (tmp_path / "class_0" / "wide.png").unlink()
    assert load_arrays(config).name == f"folder:{tmp_path.name}"  # nothing was resized


def test_image_size_resizes_other_data_sets_too(tmp_path):
    pixels, labels = random_images(40, 10, 8, 3), np.arange(40, dtype=np.int32) % 2
    np.savez(tmp_path / "a.npz", images=pixels, labels=labels)
    dataset = load_arrays(data_config("npz", path=str(tmp_path / "a.npz"), image_size=4, validation_fraction=0.0))
    assert dataset.image_shape == (4, 4, 3) and dataset.name == "npz:a.npz, resized to 4 x 4"
    assert everything(dataset) == rows(Split(np.stack([images.resize(image, 4) for image in pixels]), labels))
    assert load_arrays(data_config(image_size=4)).image_shape == (4, 4, 1)
    assert load_arrays(data_config(image_size=8)).name == "digits"  # its own size


def test_files_are_read_for_a_trained_network_as_they_were_for_its_training(tmp_path):
    config, pixels, labels = write_folder(tmp_path, shape=(9, 7, 3))
    config.image_size = 6
    dataset = load_arrays(config)
    files = sorted(tmp_path.rglob("*.png"))
    assert rows(Split(images.read_images(files, dataset.image_shape, 6), labels)) == everything(dataset)
    Image.fromarray(pixels[0, ..., 0]).save(tmp_path / "grey.png")
    grey = images.read_images([tmp_path / "grey.png"], (9, 7, 3), 0)
    assert grey.shape == (1, 9, 7, 3) and np.ptp(grey, axis=3).max() == 0
    with pytest.raises(UserError, match="is RGB, but the network takes images of 1 channel"):
        images.read_images(files, (6, 6, 1), 6)
    with pytest.raises(UserError, match=r"000.png is \(9, 7\) \(height, width\), the network takes \(6, 6\) alone"):
        images.read_images(files, (6, 6, 3), 0)
    assert images.read_images([], (6, 6, 3), 0).shape == (0, 6, 6, 3)


# ---- classes


def test_a_class_without_a_test_image_is_said(tmp_path):
    config, pixels, _ = write_folder(tmp_path, classes=3, count=6)
    assert load_arrays(config).notes == ()  # control
    for index in range(13, 18):
        (tmp_path / "class_2" / f"{index:03}.png").unlink()
    (note,) = load_arrays(config).notes
    assert note.startswith("No test image of 1 of 3 classes (class_2)")
    labels = np.arange(12) % 3
    arrays = {"images": pixels[:12], "labels": labels, "test_images": pixels[:4], "test_labels": np.zeros(4, int)}
    np.savez(tmp_path / "own.npz", **arrays)
    config = data_config("npz", path=str(tmp_path / "own.npz"), validation_fraction=0.0)
    (note,) = load_arrays(config).notes
    assert note.startswith("No test image of 2 of 3 classes (1, 2)")


def test_an_npz_may_name_its_classes(tmp_path):
    pixels, labels = random_images(40, 5, 5, 1), np.arange(40) % 2
    config = data_config("npz", path=str(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", images=pixels, labels=labels, class_names=np.array(["cat", "hot dog"]))
    assert load_arrays(config).class_names == ("cat", "hot dog")
    for names in (np.array(["cat"]), np.arange(2), np.array([["a", "b"]])):
        np.savez(tmp_path / "a.npz", images=pixels, labels=labels, class_names=names)
        with pytest.raises(UserError, match=r"expected class_names as texts \(2,\)"):
            load_arrays(config)
    np.savez(tmp_path / "a.npz", images=pixels, labels=labels)
    assert load_arrays(config).class_names is None
