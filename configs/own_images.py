"""Your own images: a folder with a folder per class, or an .npz file (docs/data.md). A LiResNet (arXiv:2301.12549) that
is sized by the images found: its stem leaves maps of about 16 x 16, more images get a larger net and fewer epochs.

Run: python train.py --config=configs/own_images.py --config.data.path=FOLDER_OR_NPZ --workdir=DIR
Other sizes: --config.data.image_size=64 resizes the images, --config.model.width=64 and so on set what is set here.
A start, not tuned to any data set. docs/training.md and docs/config.md say what there is to tune.
"""

from lipjax.training.config import default_config
from lipjax.training.data.own import describe


def get_config():
    config = default_config(optimizer="nadamw")
    config.batch_size = 128
    config.num_epochs = 30
    config.power_iterations = 3

    config.data.name = "folder"

    config.model.depth = 6
    config.model.width = 64

    config.optimizer.learning_rate = 2e-3
    return config.lock()


def adapt(config, data):
    """Called by train.py with what the flags say about the data. Fields that flags set stay as they are."""
    if not data.path:
        return
    found = describe(data.path, data.image_size)
    config.data.name = found.kind

    side = min(found.size)
    stride = max(1, min(round(side / 16), side // 4))  # the neck needs maps of 4 x 4
    windows = {1: (3, 1), 2: (5, 2), 3: (5, 1), 4: (7, 3)}
    config.model.stem_kernel, config.model.stem_padding = windows.get(stride, (stride, 0))
    config.model.stem_strides = stride

    train = max(1, round(found.count * (1 - data.test_fraction) * (1 - data.validation_fraction)))
    config.model.depth, config.model.width = (2, 32) if train < 2000 else (4, 64) if train < 20_000 else (6, 64)
    config.batch_size = max(1, 2 ** min(7, (train // 8).bit_length() - 1)) if train >= 16 else 1
    config.num_epochs = min(300, max(30, 400_000 // train))
    config.checkpoint.every_epochs = max(1, config.num_epochs // 30)
