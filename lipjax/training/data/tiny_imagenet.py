"""The TFDS builder of Tiny ImageNet, which TFDS 4.9.10 lacks. Importing this file imports and registers with TFDS."""

import zipfile

import tensorflow_datasets as tfds
from tensorflow_datasets.core import units
from tensorflow_datasets.core.download import checksums

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
ROOT = "tiny-imagenet-200"


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
    """Tiny ImageNet: 200 classes, 64 x 64, 500 training and 50 validation images each; test labels are not public.

    Labels number the WordNet ids in sorted order. The stored JPEG bytes are kept, so preparing encodes nothing.
    Source: Y. Le and X. Yang, Tiny ImageNet visual recognition challenge, Stanford CS231n, 2015.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Without this TFDS would look for a checksum file beside its own builders. The digest of the published archive.
    url_infos = {
        URL: checksums.UrlInfo(
            size=units.Size(248_100_043),
            checksum="6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
            filename=f"{ROOT}.zip",
        )
    }

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Tiny ImageNet, the labelled splits.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(64, 64, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(num_classes=200),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="http://cs231n.stanford.edu/",
        )

    def _split_generators(self, dl_manager):
        # Read inside the archive: unpacking would write 120,000 small files.
        archive = dl_manager.download(URL)
        with zipfile.ZipFile(archive) as files:
            names = sorted(files.read(f"{ROOT}/wnids.txt").decode().split())
        self.info.features["label"].names = names  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
        return {
            "train": self._generate_examples(archive, self._train_labels),
            "validation": self._generate_examples(archive, self._validation_labels),
        }

    @staticmethod
    def _train_labels(files):
        parts = [(name, name.split("/")) for name in files.namelist()]
        return {name: part[2] for name, part in parts if len(part) == 5 and part[1] == "train" and part[4]}

    @staticmethod
    def _validation_labels(files):
        lines = files.read(f"{ROOT}/val/val_annotations.txt").decode().splitlines()
        rows = [line.split("\t") for line in lines if line]
        return {f"{ROOT}/val/images/{row[0]}": row[1] for row in rows}

    def _generate_examples(self, archive, read_labels):
        with zipfile.ZipFile(archive) as files:
            for name, wnid in sorted(read_labels(files).items()):
                yield name, {"image": files.read(name), "label": wnid}
