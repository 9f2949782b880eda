"""A streamed data set in two processes: each reads its own part, and together they are one run."""

import json

import pytest
from cluster_helpers import Processes, assert_agree, keep_until, metrics
from data_helpers import expect, write_imagenet
from training_helpers import latest_step, quick_compiles, tiny_config  # noqa: F401  quick_compiles is a fixture

from lipjax.training.data import prepare
from lipjax.training.loop import train

COUNTS = {"train": 24, "test": 10}
# Makes the counts of the made-up archive those of the complete data set, as `expect` does in this process.
PREAMBLE = f"""
import dataclasses
from lipjax.training.data import prepared
prepared.PREPARED["imagenet"] = dataclasses.replace(prepared.PREPARED["imagenet"], **{COUNTS!r})
"""


@pytest.mark.nightly
@pytest.mark.x64_off
@pytest.mark.parametrize("workers", [0, 1])
def test_two_processes_of_two_devices_read_a_stream_as_one(tmp_path, monkeypatch, workers):
    expect(monkeypatch, "imagenet", **COUNTS)
    prepare.prepare("imagenet", write_imagenet(tmp_path), download=False)
    changes = {
        **{"data.name": "imagenet", "data.path": "", "data.data_dir": str(tmp_path), "data.validation_fraction": 1 / 6},
        **{"data.image_size": 8, "data.crop_padding": 0, "data.workers": workers, "data.flip": True},
        **{
            "batch_size": 8,
            "num_epochs": 3,
            "checkpoint.every_steps": 3,
            "checkpoint.keep": 10,
            "certify.batch_size": 5,
        },
    }
    with Processes(tiny_config(**changes, **{"mesh.data": -1}), tmp_path / "two", preamble=PREAMBLE) as processes:
        (code, out, err), (other_code, other_out, other_err) = processes.finish()
    assert (code, other_code) == (0, 0), f"{err}\n{other_err}"
    assert "4 x cpu" in out and "Written to" in out and other_out == ""
    found = metrics(tmp_path / "two")
    assert [line["step"] for line in found if line["split"] == "train"] == [2, 4, 6]  # 20 images, 8 a step
    assert len(json.loads((tmp_path / "two" / "certificate.json").read_text())["images"]) == COUNTS["test"]
    train(tiny_config(**changes, **{"mesh.data": 1}), tmp_path / "one", 0)
    assert_agree(found, metrics(tmp_path / "one"))
    train(tiny_config(**changes, **{"mesh.data": 1}), tmp_path / "seed", 1)  # control
    with pytest.raises(AssertionError):
        assert_agree(found, metrics(tmp_path / "seed"))
    # What two processes saved in the middle of an epoch goes on in one, and what one saved in two.
    keep_until(tmp_path / "two", tmp_path / "on_1", 3)
    train(tiny_config(**changes, **{"mesh.data": 1}), tmp_path / "on_1", 0)
    assert_agree(metrics(tmp_path / "on_1"), found)
    keep_until(tmp_path / "one", tmp_path / "on_2", 3)
    with Processes(tiny_config(**changes, **{"mesh.data": -1}), tmp_path / "on_2", preamble=PREAMBLE) as processes:
        assert [code for code, _, _ in processes.finish()] == [0, 0]
    assert_agree(metrics(tmp_path / "on_2"), found)
    assert latest_step(tmp_path / "on_1") == latest_step(tmp_path / "on_2") == 6
