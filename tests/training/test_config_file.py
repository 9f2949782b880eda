"""Configs by name and by flags: what is found, in which order, and what a mistake is told."""

import pathlib
import shutil

import ml_collections
import numpy as np
import pytest
from absl import flags
from PIL import Image

import lipjax
from lipjax import command
from lipjax.errors import UserError
from lipjax.models import MODELS, get_model
from lipjax.training import config_file, config_reference, objective
from lipjax.training.choices import CHOICES
from lipjax.training.config import default_config, validate
from lipjax.training.config_file import find, read_config, split_arguments

ROOT = pathlib.Path(__file__).resolve().parents[2]


def parse(*arguments):
    return command.parse(list(arguments), flags.FlagValues())


def refused(*arguments):
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    return str(caught.value)


def test_a_config_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
    assert config_file.shipped() == ROOT / "configs"
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "digits.py", "configs/digits.py", str(ROOT / "configs" / "digits.py")):
        config, workdir = parse(f"--config={name}")
        assert config.data.name == "digits" and config.model.depth == 2 and config.is_locked
        assert workdir == "runs/digits"
    assert parse()[1] == "runs/digits"  # the default
    assert parse("--config", "digits_lipconvnet")[0].model.name == "lipconvnet"

    (tmp_path / "configs").mkdir()
    text = (ROOT / "configs" / "digits.py").read_text().replace("num_epochs = 300", "num_epochs = 7")
    for place in (tmp_path / "configs" / "digits.py", tmp_path / "mine.py"):
        place.write_text(text)
        assert parse(f"--config={place.name}")[0].num_epochs == 7  # one's own goes before a shipped one
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UserError, match="no such file"):
        find("elsewhere/digits.py")


def test_a_wheel_has_the_configs_inside_the_package(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "lipjax"
    shutil.copytree(ROOT / "configs", package / "_configs")
    monkeypatch.setattr(lipjax, "__file__", str(package / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert find("digits") == package / "_configs" / "digits.py"
    assert parse("--config=liresnet:cifar100")[0].data.name == "cifar100"
    shutil.rmtree(package)  # control
    with pytest.raises(UserError, match="--config=digits: there is no such file"):
        find("digits")


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("digit", "did you mean digits"),
        ("configs/digtis.py", "did you mean digits"),
        ("cifar10_liresnet_smal", "did you mean cifar10_liresnet_small"),
        ("zzz", "the names are baselines, "),
    ],
)
def test_a_config_that_is_not_there_is_answered_with_close_names(name, close):
    message = refused(f"--config={name}")
    assert (
        message.startswith(f"--config={name}: there is no such file, and no config of that name; ") and close in message
    )


def test_a_mistyped_flag_is_answered_with_the_right_one():
    assert "Did you mean: workdir" in refused("--wrkdir=x")
    assert "Did you mean: config ?" in refused("--confg=digits")
    assert "--config needs the name" in refused("--config")
    assert "--config needs the name" in refused("--config", "--workdir=x")
    assert "fields are set as --config.field=value" in refused("batch_size=3")


def test_the_order_of_flags_does_not_matter():
    first = parse("--config.batch_size=64", "--workdir=w", "--config=digits_lipconvnet", "--config.model.depth=12")
    last = parse("--config=digits_lipconvnet", "--config.model.depth", "12", "--config.batch_size=64", "--workdir", "w")
    assert first[0] == last[0] and first[0].batch_size == 64 and first[0].model.depth == 12 and first[1] == "w"
    assert parse("--config=digits", "--config=digits_lipconvnet")[0].model.name == "lipconvnet"  # the last one counts
    assert parse("--config.batch_size=1", "--config.batch_size=2")[0].batch_size == 2
    assert parse("--noconfig.data.flip")[0].data.flip is False and parse("--config.data.flip")[0].data.flip is True
    assert split_arguments(["--config=a", "--", "--config=b"]) == ("a", ["--", "--config=b"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.lr=0.1", "config.lr. Did you mean config.optimizer.learning_rate or "),
        ("--config.learning_rate=0.1", "config.learning_rate. Did you mean config.optimizer.learning_rate?"),
        ("--config.optimiser.learning_rate=0.1", "Did you mean config.optimizer.learning_rate?"),
        ("--config.optimizer.learning_rat=0.1", "Did you mean config.optimizer.learning_rate?"),
        ("--config.epochs=3", "Did you mean config.num_epochs"),
        ("--config.image_size=3", "Did you mean config.data.image_size?"),
        (
            "--config.model.layer=soc",
            "The model compared, concatnet, lipconvnet, patchnet, potentialnet, sandwichnet or stagednet has it",
        ),
        (
            "--config.loss.weight_growth=1",
            "The loss crm or crm_max has it, and this config's is margin: set ",
        ),
        ("--config.optimizer.decay_from=1", "The schedule exponential has it, and this config's is cosine"),
        ("--config.certify.radii[0]=1", "Did you mean config.certify.radii?"),
        ("--config.los.epsilon=1", "Did you mean config.loss.epsilon?"),
        ("--config.zzz=1", "no such config field: config.zzz. `lipjax train --help`"),
    ],
)
def test_an_unknown_field_is_answered_with_the_one_that_is_meant(argument, message):
    found = refused(argument)
    assert found.startswith("no such config field: ") and message in found


def test_another_model_starts_from_its_own_defaults():
    config, _ = parse("--config=cifar10_liresnet_small", "--config.model.name=lipconvnet")
    validate(config)
    model = get_model(config.model, input_shape=(32, 32, 3), num_classes=10)
    assert (model.depth, model.layer, config.model.train_terms) == (5, "soc", 5)
    assert config.model.input_mean == (0.5,) and "stem_kernel" not in config.model
    config, _ = parse("--config.model.layer=cayley", "--config.model.name", "lipconvnet", "--config.model.depth=10")
    assert (config.model.layer, config.model.depth) == ("cayley", 10)
    config, _ = parse("--config=digits_lipconvnet", "--config.model.name=liresnet", "--config.model.neck_features=8")
    assert config.model.neck_features == 8 and config.model.width == 512 and config.model.input_std == (0.1,)
    get_model(config.model, input_shape=(32, 32, 3), num_classes=10)
    # The model that the config has keeps what the config says about it.
    assert parse("--config=digits", "--config.model.name=liresnet")[0].model.depth == 2
    for name in MODELS:
        validate(parse(f"--config.model.name={name}")[0])


def test_another_loss_or_optimizer_brings_its_own_fields():
    config, _ = parse("--config.loss.weight=3", "--config=digits", "--config.loss.name=crm")
    validate(config)
    assert (config.loss.weight, config.loss.temperature, config.loss.epsilon) == (3.0, 5.0, 0.25)
    assert "epsilon_end" not in config.loss
    config, _ = parse("--config=digits", "--config.loss.name", "emma")  # what both have stays
    assert (config.loss.epsilon_end, config.loss.epsilon) == (1.0, 0.25)
    chosen = ("--config.optimizer.name=sgd", "--config.optimizer.schedule=exponential")
    config, _ = parse(*chosen, "--config.optimizer.decay_from=2")
    validate(config)
    assert config.optimizer.decay_from == 2.0 and "eps" not in config.optimizer
    assert config.optimizer.learning_rate == 1e-2  # the config's
    for name in objective.LOSSES:
        validate(parse(f"--config.loss.name={name}")[0])


def test_families_of_configs(tmp_path, monkeypatch, capsys):
    config, workdir = parse("--config=liresnet:cifar100", "--config.batch_size=64")
    assert (config.data.name, config.batch_size, workdir) == ("cifar100", 64, "runs/liresnet_cifar100")
    assert parse("--config=configs/lipconvnet.py:cifar10,mlp")[1] == "runs/lipconvnet_cifar10_mlp"
    assert parse("--config=recipe:imagenet,small")[0].data.image_size == 64
    for name, said in (
        ("liresnet", "needs the name of a variant"),
        ("liresnet:cifar", "there is no variant 'cifar'"),
        ("digits:x", "is one config, without variants"),
        ("digits:help", "is one config, without variants"),
    ):
        if name == "digits:help":
            assert command.main([f"--config={name}"]) == 2
            assert said in capsys.readouterr().err
        else:
            message = refused(f"--config={name}")
            assert said in message and ("liresnet:tiny_imagenet" in message) == name.startswith("liresnet")
    for arguments in (["--config=lipconvnet:help"], ["--workdir=x", "--config", "configs/lipconvnet.py:help"]):
        assert command.main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        name = arguments[-1].removeprefix("--config=").removesuffix(":help")
        assert [line.split()[0] for line in lines] == [f"{name}:{v}" for v in config_file.variants(find(name))]
        assert all(len(line.split()) > 3 for line in lines)
    # One's own families: with a list of variants, or without, as other projects have them.
    head = "from lipjax.training.config import default_config\n"
    body = "def get_config(arg='a'):\n  config = default_config()\n  config.data.path = arg\n  return config\n"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(head + body)
    assert parse("--config=mine.py:b")[0].data.path == "b" and parse("--config=mine.py")[0].data.path == "a"
    (tmp_path / "mine.py").write_text(head + "VARIANTS = {'b': 'a line'}\n" + body)
    assert parse("--config=mine.py:b")[0].data.path == "b"
    assert "there is no variant 'c'" in refused("--config=mine.py:c")


def folder(root, size, per_class=3):
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            Image.fromarray(np.full((*size, 3), 9 * i, np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize("size", [(8, 8), (20, 31), (32, 32), (48, 48), (64, 80), (100, 100), (224, 224)])
def test_own_images_size_the_network(tmp_path, size):
    path = folder(tmp_path / "photos", size)
    config, _ = parse("--config=own_images", f"--config.data.path={path}")
    validate(config)
    model = get_model(config.model, input_shape=(*size, 3), num_classes=2)
    stem = [(n + 2 * model.stem_padding - model.stem_kernel) // model.stem_strides + 1 for n in size]
    assert 4 <= min(stem) <= 24 and config.data.name == "folder"
    config, _ = parse("--config=own_images", f"--config.data.path={path}", "--config.data.image_size=16")
    assert config.model.stem_strides == 1
    config, _ = parse("--config.model.stem_strides=3", "--config=own_images", f"--config.data.path={path}")
    assert config.model.stem_strides == 3  # what a flag sets stays


def test_own_images_count(tmp_path):
    def sized(count):
        file = tmp_path / "own.npz"
        np.savez(file, images=np.zeros((count, 8, 8), np.uint8), labels=np.arange(count) % 2)
        return parse("--config=own_images", f"--config.data.path={file}")[0]

    few, some = sized(40), sized(6000)
    assert few.data.name == some.data.name == "npz"
    assert few.batch_size < some.batch_size == 128 and few.num_epochs == 300 > some.num_epochs
    assert few.batch_size <= 0.7 * 40 and few.model.depth < some.model.depth
    assert parse("--config=own_images")[0].data.path == ""  # for --help; training then asks for the path
    assert "there is no folder and no .npz file" in refused(
        "--config=own_images", f"--config.data.path={tmp_path / 'x'}"
    )
    (tmp_path / "bad.npz").write_bytes(b"PK")
    assert "is not an npz file with" in refused("--config=own_images", f"--config.data.path={tmp_path / 'bad.npz'}")


def test_help_shows_every_field_with_its_comment_and_default(capsys):
    assert command.main(["--help"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    for field in config_reference.fields():
        if field.default:
            place = lines.index(f"  --config.{field.name}={field.default}")
            assert lines[place + 1].strip() and " ".join(field.comment.split()[:5]) in lines[place + 1]
    for field in ("loss.epsilon_end=3.0", "optimizer.eps=1e-08", "optimizer.final_fraction=1e-05"):
        assert lines[lines.index(f"  --config.{field}") + 1].strip()
    assert "      crm: temperature=5.0 radius=0.2 weight=15.0" in out and "      sgd: none" in out
    for flag in ("--workdir", "--config:", "--coordinator", "digits_lipconvnet", "num_blocks=5"):
        assert flag in out
    assert command.main(["--config=digits_lipconvnet", "-h"]) == 0
    out = capsys.readouterr().out
    assert "--config.num_epochs=40" in out and "--config.model.layer='soc'" in out and "stem_kernel=5" in out
    assert "--config.model.stem_kernel" not in out and "--config.loss.epsilon_end=1.0" in out


def test_every_field_has_a_comment():
    def flat(config, prefix=""):
        for name, value in config.items():
            yield prefix + name
            if isinstance(value, ml_collections.ConfigDict):
                yield from flat(value, f"{prefix}{name}.")

    found = {field.name: field for field in config_reference.fields()}
    own = {field.name: field for choice in CHOICES[1:] for field in config_reference.own_fields(choice)}
    assert set(found) | set(own) >= set(flat(default_config())) and not set(found) & set(own)
    assert set(found) < set(flat(default_config()))
    assert [field.name for field in found.values() if field.default and not field.comment] == []
    assert found["certify.radii"].default == "(36 / 255, 72 / 255, 108 / 255)"
    assert [field.name for field in own.values() if not field.comment] == []
    assert own["loss.radius_growth"].note == "crm, crm_max" and own["optimizer.decay_from"].note == "exponential"


def test_the_config_reference_is_up_to_date():
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == config_reference.as_markdown(), "run: python -m lipjax.training.config_reference > docs/config.md"


def test_a_config_file_that_is_no_config_is_refused(tmp_path):
    for text, message in (
        ("", "must define get_config()"),
        ("def get_config():\n  return {'a': 1}", "must define get_config()"),
        ("def get_config():\n  raise RuntimeError('no luck')", "RuntimeError: no luck"),
        ("def get_config(", "SyntaxError"),
    ):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(UserError, match=".*bad.py: .*") as caught:
            read_config(str(tmp_path / "bad.py"), [])
        assert message in str(caught.value)
