"""What lipjax writes can be read by whom the umask lets: services and containers run as other users."""

import os
import stat

import numpy as np
import pytest
from checker_helpers import NETWORKS, write_run
from training_helpers import quick_compiles, tiny_config  # noqa: F401

from lipjax import files
from lipjax.evaluation import falsify
from lipjax.evaluation.html.page import write_reports
from lipjax.run import run


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(directory):
    """The modes of all files and folders below a directory that are not what the umask says."""

    def wanted(path):
        return (0o777 if path.is_dir() else 0o666) & ~mask

    mask = os.umask(0)
    os.umask(mask)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*")}
    assert len(found) >= 3
    return {str(path.relative_to(directory)): oct(mode) for path, mode in found.items() if mode != wanted(path)}


def test_a_certificate_and_its_network_respect_the_umask(umask, tmp_path):
    frozen = write_run(tmp_path, NETWORKS["mlp_network"]())
    falsify.save_arrays(tmp_path / "attack.npz", index=np.arange(3))
    assert modes(tmp_path) == {}
    # Written again over files of another mode.
    for path in tmp_path.rglob("*.safetensors"):
        path.chmod(0o600)
    assert len(modes(tmp_path)) == 2  # control
    write_run(tmp_path, frozen.network)
    assert modes(tmp_path) == {}


def test_a_private_file_in_the_place_of_the_temporary_one_becomes_as_the_umask_says(umask, tmp_path):
    with files.replacing(tmp_path / "a") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.nightly
@pytest.mark.x64_off
def test_all_files_of_a_run_respect_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        run(tiny_config(num_epochs=1, **{"optimizer.warmup_epochs": 0.0}), tmp_path)
        write_reports([tmp_path])
        assert (tmp_path / "attack.npz").exists() and list(tmp_path.glob("checkpoints/*/state/manifest.ocdbt"))
        assert modes(tmp_path) == {}
    finally:
        os.umask(before)
