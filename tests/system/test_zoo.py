"""The zoo: what lipjax brings is whole, proved and runs elsewhere; zoos of one's own; nothing is fetched unasked."""

import hashlib
import json
import os
import re
import shutil
import urllib.request
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import safetensors.numpy

import lipjax
from lipjax import checker, zoo
from lipjax.__main__ import main
from lipjax.errors import UserError
from lipjax.zoo import adding, fetching
from lipjax.zoo.library import MANIFEST, REQUIRED

SMALL = ("digits_cayley", "digits_liresnet")


def report_of(name):
    return json.loads((zoo.directory(name) / "report.json").read_text())


def test_the_zoo_is_small_and_lists_what_is_there():
    assert set(SMALL) <= set(zoo.list())
    files = [path for path in zoo.library.HOME.rglob("*") if path.is_file() and path.suffix != ".py"]
    assert sum(path.stat().st_size for path in files if "__pycache__" not in path.parts) < 25e6
    for name in zoo.list():
        texts = [path.read_text() for path in zoo.directory(name).glob("*.json")]
        assert not any(f'"{place}' in text for text in texts for place in ("/tmp", "/home", "/root", "/work"))


@pytest.mark.parametrize("name", zoo.list())
def test_a_card_says_what_its_report_says(name):
    card, report = zoo.card(name), report_of(name)
    front = card.split("---\n")[1]
    values = [float(line.split(": ")[1]) for line in front.splitlines() if line.lstrip().startswith("value: ")]
    assert values == [report["clean_accuracy"], *report["certified_accuracy"].values()]
    assert "## Training\n\nCost: " in card and f"lipjax zoo retrain {name}" in card
    frozen = zoo.load(name)
    assert frozen.sha256() in card and frozen.dtype == "float32"


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SMALL else pytest.mark.nightly) for n in zoo.list()])
def test_the_zoo_is_proved_again(name, capsys):
    assert main(["check", f"zoo/{name}"]) == 0
    assert "every bound proved" in capsys.readouterr().out


@pytest.mark.parametrize("name", zoo.list())
def test_onnxruntime_gives_the_classes_of_the_certificate(name, tmp_path):
    """On all images at hand, with margins that are no further from the exact ones than is proved of float32."""
    folder, report = zoo.directory(name), report_of(name)
    certificate = json.loads((folder / "certificate.json").read_text())
    images = safetensors.numpy.load_file(folder / "images.safetensors")
    zoo.load(name).to_onnx(tmp_path / "network.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "network.onnx"), providers=["CPUExecutionProvider"])
    pixels = images["pixels"].astype(np.float32) / np.float32(certificate["data"]["pixel_max"])
    logits = session.run(None, {"pixels": pixels})[0].astype(np.float64)
    rows = [certificate["images"][i] for i in images["indices"]]
    predicted, rivals, margins = (np.array([row[key] for row in rows]) for key in ("prediction", "rival", "margin"))
    same, count = np.argmax(logits, axis=1) == predicted, np.arange(len(rows))
    off = np.abs(logits[count, predicted] - logits[count, rivals] - margins)
    assert 1e-9 < off.max() <= 2 * report["float32"]["bound"]["largest"]  # float32 it was
    assert np.mean(same) == 1 if name in SMALL else np.mean(same) > 0.999
    # Control: they are classes of these images.
    assert abs(np.mean(predicted == images["labels"]) - report["clean_accuracy"]) < 0.05


def copied(directory):
    """The zoo's smallest network in a zoo of one's own."""
    shutil.copytree(zoo.directory("digits_liresnet"), directory / "mine")
    return directory / "mine"


@pytest.mark.parametrize("file", [*REQUIRED, MANIFEST])
def test_a_changed_file_is_refused(tmp_path, file):
    folder = copied(tmp_path)
    zoo.load(folder)  # control: a copy loads, by its path
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(bytes(data))
    with pytest.raises(UserError, match="hashes to|damaged|not whole"):
        zoo.load(folder)
    (folder / file).unlink()
    with pytest.raises(UserError, match="not whole|Expected a network"):
        zoo.card(folder)


def edited(folder, **changes):
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return manifest["files"]


def test_files_that_belong_to_others_are_refused(tmp_path):
    folder = copied(tmp_path)
    files = edited(folder)
    with pytest.raises(UserError, match="not those of a network"):
        edited(folder, files=files | {"../secret": "0"})
        zoo.load(folder)
    shutil.rmtree(folder / "frozen")
    shutil.copytree(zoo.directory("digits_cayley") / "frozen", folder / "frozen")
    parts = (path for path in files if path.startswith("frozen/"))
    own = {path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in parts}
    edited(folder, files=files | own)
    with pytest.raises(UserError, match="the certificate is about another network"):
        zoo.load(folder)


def test_a_run_is_added_to_a_zoo_of_ones_own(tmp_path, capsys):
    run, root = copied(tmp_path), tmp_path / "zoo"
    document = json.loads((run / "config.json").read_text())
    document["config"]["data"]["data_dir"] = "/somewhere/here"
    (run / "config.json").write_text(json.dumps(document))
    command = ["zoo", "add", str(run), "other", "--about", "A copy.", "--cost", "nothing", "--zoo", str(root)]
    assert main(command) == 0 and main(command) == 0  # again: replaced
    assert zoo.list(root) == ["other"]
    assert main(["zoo", "list", "--zoo", str(root)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["other", str(root / "other")]
    assert zoo.load("other", root).sha256() == zoo.load("digits_liresnet").sha256()
    assert "A copy." in zoo.card("other", root) and "somewhere" not in (root / "other/config.json").read_text()
    assert checker.check(root / "other")[0] == 0
    with pytest.raises(UserError, match="Expected a name of letters"):
        zoo.add(run, "../other", about="", cost="", root=root)
    (run / "report.json").write_text(json.dumps(report_of("digits_cayley")))
    with pytest.raises(UserError, match="report.json is about another network"):
        zoo.add(run, "other", about="", cost="", root=root)
    (run / "certificate.json").unlink()
    with pytest.raises(UserError, match="certificate.json is missing"):
        zoo.add(run, "other", about="", cost="", root=root)
    (root / "mine").mkdir()
    with pytest.raises(UserError, match="no network of a zoo"):
        zoo.add(zoo.directory("digits_cayley"), "mine", about="", cost="", root=root)


def add(run, name, root):
    return zoo.add(run, name, about="A copy.", cost="nothing", root=root)


def test_a_network_is_replaced_by_a_whole_one_or_not_at_all(tmp_path, monkeypatch):
    folder = copied(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for broken in ("card_text", "write_json", "load"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(adding, broken, mock.Mock(side_effect=OSError("no space")))
            add(zoo.directory("digits_cayley"), "mine", tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    rename = os.rename
    fails = mock.Mock(side_effect=lambda a, b: rename(a, b) if fails.call_count != 2 else rename(a, tmp_path / "no/x"))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No such file"):
        patch.setattr(os, "rename", fails)
        add(zoo.directory("digits_cayley"), "mine", tmp_path)
    assert fails.call_count == 3 and {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert add(folder, "mine", tmp_path) == folder  # its own
    assert zoo.load(folder).sha256() == zoo.load("digits_liresnet").sha256() and "A copy." in zoo.card(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def begun_from_weights(tmp_path):
    """A run whose config names the weights that it began from, added to a zoo as "first"."""
    run = copied(tmp_path)
    for file in ("config.json", "certificate.json"):
        document = json.loads((run / file).read_text())
        document["config"]["init_from"] = "/somewhere/here"
        (run / file).write_text(json.dumps(document))
    return add(run, "first", tmp_path)


def test_a_run_that_began_from_weights_says_so_and_names_no_path(tmp_path):
    first = begun_from_weights(tmp_path)
    for folder in (first, add(first, "second", tmp_path)):  # also a zoo's network in another zoo
        assert "began from the weights of another run" in zoo.card(folder) and "retrain" not in zoo.card(folder)
        assert not any("somewhere" in path.read_text() for path in folder.glob("*.json"))
    assert "began from" not in zoo.card(add(zoo.directory("digits_liresnet"), "third", tmp_path))  # control


@pytest.mark.slow  # imports what trains
def test_a_run_that_began_from_weights_is_not_trained_again(tmp_path, capsys):
    first = begun_from_weights(tmp_path)
    assert main(["zoo", "retrain", str(first), "--workdir", str(tmp_path / "again")]) == 2
    assert "train that one first" in capsys.readouterr().err and not (tmp_path / "again").exists()


def certified(folder, text):
    """Another certificate in the folder, with its hash in the list."""
    (folder / "certificate.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    edited(folder, files=edited(folder) | {"certificate.json": digest})


def test_images_are_those_whose_hash_is_checked(tmp_path):
    folder = copied(tmp_path)
    document = json.loads((folder / "certificate.json").read_text())
    safetensors.numpy.save_file({"pixels": np.zeros(1), "labels": np.zeros(1)}, tmp_path / "other.safetensors")
    certified(folder, json.dumps(document | {"sample": document["sample"] | {"file": "../other.safetensors"}}))
    with pytest.raises(UserError, match="certificate names '../other.safetensors'"):
        zoo.images(folder)
    certified(folder, json.dumps(document | {"data": document["data"] | {"pixel_max": None}}))
    with pytest.raises(UserError, match="names None as the largest pixel"):
        zoo.images(folder)
    certified(folder, json.dumps(document))
    assert zoo.images(folder)[0].shape == (359, 8, 8, 1)  # control
    for text in ("[]", "null", "{}", '{"sample": "x"}'):
        certified(folder, text)
        for function in (zoo.load, zoo.images):
            with pytest.raises(UserError, match="is no certificate with"):
                function(folder)


def test_fetching_checks_every_hash(tmp_path, capsys):
    folder = copied(tmp_path)
    url, digest = folder.as_uri(), hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    assert main(["zoo", "fetch", url, str(tmp_path / "got"), "--sha256", digest]) == 0
    assert zoo.load(tmp_path / "got").sha256() == zoo.load("digits_liresnet").sha256()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["got", "mine"]  # nothing else is left
    with pytest.raises(UserError, match="is there already"):
        zoo.fetch(url, tmp_path / "got")
    with pytest.raises(UserError, match="hashes to .*, not to"):
        zoo.fetch(url, tmp_path / "new", "0" * 64)
    (folder / "README.md").write_text("Something else.")
    with pytest.raises(UserError, match="README.md hashes to"):
        zoo.fetch(url, tmp_path / "new", digest)
    (folder / "README.md").unlink()
    with pytest.raises(UserError, match="README.md did not come"):
        zoo.fetch(url, tmp_path / "new", digest)
    with pytest.raises(UserError, match="Expected a URL of https, http, file"):
        zoo.fetch("ftp://example.org/mine", tmp_path / "new")
    assert not (tmp_path / "new").exists() and len(list(tmp_path.iterdir())) == 2


def test_redirections_lead_to_nothing_weaker(tmp_path):
    def redirected(old, new):
        request = urllib.request.Request(old)
        return fetching._Redirections().redirect_request(request, None, 302, "Found", {}, new).full_url

    for old, new in (("https://a.org/x", "https://b.org/x"), ("http://a.org/x", "https://b.org/x")):
        assert redirected(old, new) == new
    for old, new in (("https://a.org/x", "http://a.org/x"), ("http://a.org/x", "ftp://a.org/x")):
        with pytest.raises(UserError, match=f"{old} redirects to {new}"):
            redirected(old, new)
    with pytest.raises(UserError, match="did not come"):  # http.client.InvalidURL, before anything is sent
        zoo.fetch("http://localhost/a b", tmp_path / "new")


def test_nothing_is_fetched_unasked():
    with pytest.raises(UserError, match="Nothing is fetched unasked"):
        zoo.load("https://example.org/zoo/mine")
    with pytest.raises(UserError, match=r"\(.*digits_cayley, .*\) or the path of one, got 'unknown'"):
        zoo.load("unknown")
    with pytest.raises(UserError, match="Expected a folder of networks"):
        zoo.list("nowhere")


def test_names_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert zoo.located("zoo/digits_cayley") == str(zoo.directory("digits_cayley"))
    assert zoo.located("runs/digits_cayley") == "runs/digits_cayley"
    for command in (["check", "zoo/unknown"], ["predict", "zoo/unknown", "a.png"], ["compare", "zoo/unknown"]):
        assert main(command) == 2
        assert re.fullmatch(r"Error: .*\(.*digits_cayley, .*\) after zoo/, got 'unknown'\.\n", capsys.readouterr().err)
    (tmp_path / "zoo" / "digits_cayley").mkdir(parents=True)
    assert zoo.located("zoo/digits_cayley") == "zoo/digits_cayley"  # one's own goes before ours
    assert zoo.located("zoo/unknown") == "zoo/unknown"
    assert main(["zoo", "card", "zoo/digits_cayley"]) == 0
    assert capsys.readouterr().out == lipjax.zoo.card("digits_cayley")
    assert main(["zoo", "card", "unknown"]) == 2


def test_networks_of_the_zoo_are_asked_and_compared_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(
        "lipjax.evaluation.predict.predict_files", lambda *given: asked.append(given) or [("a", "2", 0.5)]
    )
    assert main(["predict", "zoo/digits_liresnet", "a.png"]) == 0 and "0.5" in capsys.readouterr().out
    assert asked == [(zoo.directory("digits_liresnet"), ["a.png"])]
    assert main(["compare", "zoo/digits_liresnet", "zoo/digits_cayley"]) == 0
    out = capsys.readouterr().out
    assert (
        "zoo/digits_liresnet" in out and "zoo/digits_cayley" in out and str(zoo.directory("digits_cayley")) not in out
    )
    assert re.search(r"model\.name +│ +\"liresnet\" │ +\"lipconvnet\" │", out)


def test_retraining_takes_the_config_and_seed_of_the_network(tmp_path, monkeypatch, capsys):
    taken = []
    monkeypatch.setattr("lipjax.run.run", lambda config, workdir: taken.append((config, workdir)))
    assert main(["zoo", "retrain", "zoo/digits_liresnet", f"--workdir={tmp_path / 'again'}"]) == 0
    (config, workdir) = taken[0]
    stored = json.loads((zoo.directory("digits_liresnet") / "config.json").read_text())
    assert config.seeds == (stored["seed"],)
    assert (config.model.name, config.num_epochs, workdir) == ("liresnet", 300, str(tmp_path / "again"))
    (tmp_path / "again" / "frozen").mkdir(parents=True)
    assert main(["zoo", "retrain", "digits_liresnet", f"--workdir={tmp_path / 'again'}"]) == 2
    assert "holds a certified run" in capsys.readouterr().err and len(taken) == 1
