"""Checkpoints that are damaged: put aside, said, and the run goes on from an older one."""

import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_helpers import quick_compiles, tiny_config, trained  # noqa: F401  quick_compiles is a fixture

from lipjax.errors import UserError
from lipjax.training import damage
from lipjax.training.checkpoint import Checkpointer
from lipjax.training.loop import train


def state(step):
    return {"w": jnp.full((16, 8), step, jnp.float32), "step": jnp.int32(step)}


TARGET = jax.eval_shape(lambda: state(0))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """checkpoints/ with the steps 1 (the best), 2 and 3. Copy it before changing anything in it."""
    directory = tmp_path_factory.mktemp("written") / "checkpoints"
    with Checkpointer(directory, keep=3) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state(step), {"config": {"depth": 6}}, metric=1.0 / step)
    return directory


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run" / "checkpoints")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


WAYS = {
    "deleted": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one bit": flip,
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


def repaired(directory, keep=3):
    """What a training does with a directory: (the step it goes on from, what it is told)."""
    lines = []
    with Checkpointer(directory, keep=keep, repaired=lines.append) as checkpointer:
        restored, meta = checkpointer.restore(TARGET)
        assert meta == {"config": {"depth": 6}}
    step = int(restored["step"])
    assert np.array_equal(restored["w"], np.full((16, 8), step))
    return step, lines


@pytest.mark.parametrize("how", WAYS)
def test_every_damage_of_every_file_is_put_aside(written, tmp_path, how):
    files = sorted(path.relative_to(written) for path in (written / "3").rglob("*") if path.is_file())
    assert {"digests.json", "_METADATA", "manifest.ocdbt", "_sharding", "metadata", "metrics"} <= {
        f.name for f in files
    }
    for number, file in enumerate(files):
        run = tmp_path / str(number)
        directory = shutil.copytree(written, run / "checkpoints")
        WAYS[how](directory / file)
        step, lines = repaired(directory)
        if file.name in ("_CHECKPOINT_METADATA", "commit_success.txt"):  # Orbax's marks, which say nothing of the data
            assert (step, lines) == (3, []) and not (run / "damaged").exists()
            continue
        assert step == 2 and sorted(path.name for path in directory.iterdir()) == ["1", "2"], file
        (aside,) = (run / "damaged").iterdir()
        assert aside.name.startswith("3-20") and len(lines) == 1
        assert lines[0].startswith("Checkpoint 3 is damaged (")
        # A digest that is damaged speaks of the file that it belongs to.
        assert file.name == damage.DIGESTS or file.relative_to("3").as_posix() in lines[0]
        assert lines[0].endswith(f"was moved to {aside}: the run goes on from step 2.")
        # Nothing is thrown away: what was not damaged is still there.
        kept = [path for path in files if path != file and (aside / path.relative_to("3")).is_file()]
        assert len(kept) == len(files) - 1


@pytest.mark.parametrize("what", ["state", "meta", "metrics", ""])
def test_a_directory_that_is_gone_or_empty(copy, what):
    shutil.rmtree(copy / "3" / what)
    (copy / "3" / what).mkdir()
    assert repaired(copy)[0] == 2
    if what:
        shutil.rmtree(copy / "2" / what)
        assert repaired(copy)[0] == 1


def test_a_step_that_is_a_file(copy):
    shutil.rmtree(copy / "3")
    (copy / "3").write_text("lost and found")
    step, lines = repaired(copy)
    assert step == 2 and "it is no directory" in lines[0]
    (aside,) = (copy.parent / "damaged").iterdir()
    assert aside.read_text() == "lost and found"


def test_several_are_damaged_and_an_older_one_too(copy):
    for step in (3, 2):
        flip(copy / str(step) / "digests.json")
    step, lines = repaired(copy)
    assert step == 1 and [line.split()[1] for line in lines] == ["2", "3"]
    shutil.copytree(copy / "1", copy / "5")
    flip(copy / "1" / "metrics" / "metrics")  # without which Orbax does not open the directory
    step, lines = repaired(copy)
    assert step == 1 and len(lines) == 1 and lines[0].endswith("step 5 is the latest.")
    assert [path.name for path in copy.iterdir()] == ["5"]


def test_two_of_the_same_second_get_two_names(copy, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "20300101-000000")
    for _ in range(2):
        if not (copy / "3").exists():
            shutil.copytree(copy / "2", copy / "3")
        flip(copy / "3" / "digests.json")
        assert repaired(copy)[0] == 2
    assert sorted(path.name for path in (copy.parent / "damaged").iterdir()) == [
        "3-20300101-000000",
        "3-20300101-000000-2",
    ]


def test_where_nothing_good_is_left_nothing_is_touched(copy):
    for step in (1, 2, 3):
        flip(copy / str(step) / "digests.json")
    before = sorted(copy.parent.rglob("*"))
    with pytest.raises(UserError, match=f"{copy / '3'} is damaged .* no other good one: .*start anew in another"):
        Checkpointer(copy, repaired=print)
    assert sorted(copy.parent.rglob("*")) == before


def test_what_is_not_damage_is_left_alone(copy, monkeypatch):
    assert repaired(copy) == (3, [])  # control
    lines = []
    with Checkpointer(copy, repaired=lines.append) as checkpointer:
        other = TARGET | {"w": jax.ShapeDtypeStruct((16, 9), jnp.float32)}
        with pytest.raises(UserError, match="written by another model or config"):
            checkpointer.restore(other)

    def forbidden(step):
        raise PermissionError(13, "Permission denied", str(step))

    with monkeypatch.context() as patch:
        patch.setattr(damage, "_digests", forbidden)
        with pytest.raises(UserError, match="cannot be read .PermissionError.*mend that"):
            Checkpointer(copy, repaired=lines.append)
    with pytest.raises(ValueError, match="read_only"):
        Checkpointer(copy, repaired=lines.append, read_only=True)
    flip(copy / "3" / "digests.json")
    with Checkpointer(copy, read_only=True) as checkpointer, pytest.raises(UserError, match="is damaged"):
        checkpointer.restore(TARGET)  # who may not write moves nothing
    assert lines == [] and not (copy.parent / "damaged").exists() and len(list(copy.iterdir())) == 3


def test_only_process_0_moves(copy, monkeypatch):
    flip(copy / "3" / "digests.json")
    monkeypatch.setattr(Checkpointer, "_open", lambda self: None)  # Orbax would miss the other processes
    lines = []
    for process in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert lines == [] and (copy / "3").exists()
        Checkpointer(copy, repaired=lines.append)
    assert len(lines) == 1 and not (copy / "3").exists()


@pytest.mark.x64_off
def test_a_training_goes_on_from_the_step_before(tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained(), run)
    flip(run / "checkpoints" / "9" / "meta" / "metadata")
    capsys.readouterr()
    train(tiny_config(), run, 0)
    said = capsys.readouterr().out
    assert "Checkpoint 9 is damaged (meta/metadata has other content than was written) and was moved to" in said
    assert f"Resuming {run} from step 8 of 9." in said
    assert [path.name[:2] for path in (run / "damaged").iterdir()] == ["9-"]
    assert (run / "metrics.jsonl").read_text() == (trained() / "metrics.jsonl").read_text()
    assert json.loads((run / "config.json").read_text())["seed"] == 0
    with pytest.raises(UserError, match="learning_rate: 0.03 there, 0.04 now"):  # no damage: refused as ever
        train(tiny_config(**{"optimizer.learning_rate": 0.04}), run, 0)
    assert len(list((run / "damaged").iterdir())) == 1
