"""Configs: every field is checked, and every field is read by something."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from training_helpers import made_up_images, npz_file, quick_compiles, scratch, tiny_config  # noqa: F401

from lipjax.errors import UserError
from lipjax.evaluation import evaluate
from lipjax.models import LiResNet, get_model
from lipjax.training import loop, objective, optimizer, same_run
from lipjax.training.choices import RECIPE, update
from lipjax.training.config import default_config, load_config, validate
from lipjax.training.data import load_dataset, num_generated, open_generated
from lipjax.training.sharding import make_mesh
from lipjax.training.step import preprocess, views


def fields(config, prefix=""):
    for name, value in config.items():
        yield from fields(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [f"{prefix}{name}"]


FIELDS = list(fields(default_config()))


class Recorder:
    """A config that notes which fields are read, by attribute, by index or as a mapping."""

    def __init__(self, config, read, prefix=""):
        self._config, self._read, self._prefix = config, read, prefix

    def __getattr__(self, name):
        value = getattr(self._config, name)
        if isinstance(value, ConfigDict):
            return Recorder(value, self._read, f"{self._prefix}{name}.")
        if not callable(value):
            self._read.add(f"{self._prefix}{name}")
        return value

    __getitem__ = __getattr__


def test_every_field_is_read_by_training_or_certification(tmp_path):
    """The model's fields apart: `test_every_field_of_the_model_changes_the_network`."""
    with jax.enable_x64(False):
        read, config = set(), tiny_config()
        recorder = Recorder(config, read)
        # `plain` reads every field to store it, which is not a use.
        with pytest.MonkeyPatch.context() as patch:
            for module in (loop, evaluate, same_run):
                patch.setattr(module, "plain", lambda c: json.loads(config.to_json_best_effort()))
            patch.setattr(loop, "get_model", lambda _, **sizes: get_model(config.model, **sizes))
            loop.train(recorder, tmp_path, 0)
            evaluate.certify_run(tmp_path, recorder, 0)
        for name, entry in objective.LOSSES.items():
            group = Recorder(default_config(loss=name).loss, read, f"loss {name}: ")
            seen = objective.Seen(jnp.zeros((1, 2)), jnp.zeros(1, int), jnp.ones((2, 2)), lambda: jnp.ones((1, 1)))
            entry.apply(group, seen, objective.loss_schedule(group, 20, 40))
            assert {f"loss {name}: {field}" for field in entry.fields} <= read, name
        for name, schedule in itertools.product(optimizer.OPTIMIZERS, optimizer.SCHEDULES):
            other = default_config(optimizer=name, schedule=schedule)
            other.optimizer.lookahead_period = 6
            found = set()
            optimizer.make_optimizer(Recorder(other.optimizer, found), 10, 2)
            assert set(other.optimizer) == found, (name, schedule)
        read |= {f"optimizer.{field}" for field in found}
        rand = default_config()
        rand.data.randaugment.probability = 1.0
        recorded, images = Recorder(rand.data, read, "data."), jnp.zeros((1, 4, 4, 3), jnp.uint8)
        jax.eval_shape(lambda k: preprocess(k, images, recorded, 255), jax.random.key(0))
        path = str(tmp_path / "packed.npz")
        mixed = Recorder(tiny_config(**{"data.generated.path": path, "data.generated.per_batch": 4}), read)
        np.savez_compressed(path, image=made_up_images(9)[0], label=np.arange(9) % 3)
        assert num_generated(mixed) == 4 and len(open_generated(mixed, (8, 8, 1), 3, 255)) == 9
        parts = tuple(jnp.zeros((n, 8, 8, 1), jnp.uint8) for n in (12, 4))
        jax.eval_shape(lambda k: views(k, parts, parts, mixed.data, 255, make_mesh(1, 16)), jax.random.key(0))
        other.data.update({"name": "cifar10", "data_dir": str(tmp_path / "nothing")})
        with pytest.raises(UserError):
            load_dataset(Recorder(other.data, read, "data."), 0)
    # Read by run.run, before it trains anything; the name of an optimizer is an index.
    unread = {name for name in FIELDS if not name.startswith("model.")} - read
    # The last two for ImageNet: tests/training/test_data_stream.py. build_precision on GPUs: test_build_precision.py.
    assert unread == {"seeds", "build_precision", "compilation_cache", "data.workers", "data.resample"}
    assert "data.no_such_field" not in read  # control: not everything counts as read


def test_every_field_of_the_model_changes_the_network(key):
    changes = {
        "depth": 2, "width": 6, "stem_kernel": 5, "stem_strides": 1, "stem_padding": 2, "neck_features": 8,
        "head_normalize": False, "input_mean": (0.25,), "input_std": (0.5,),
        "neck": "cholesky", "dense_depth": 2, "centering": True, "small_init": True, "block": "conventional",
    }  # fmt: skip
    attributes = {field.name for field in dataclasses.fields(LiResNet)} - {"parent", "name"}
    assert {f.removeprefix("model.") for f in FIELDS if f.startswith("model.")} == {*changes, "name", "logit_scale"}
    # The scale is beside the network: test_logit_scale.py.
    assert attributes == {*changes, "input_shape", "num_classes", "batch_size", "logit_scale"}

    def network(**options):
        config = tiny_config(**{f"model.{name}": value for name, value in options.items()})
        model = get_model(config.model, input_shape=(16, 16, 1), num_classes=3)
        # Of a training step: centring has means of 0 at the start, which are none for the evaluated network.
        build = jax.jit(lambda x: model.apply(model.init(key, x), True, method="build", mutable=["lip"])[0])
        leaves, structure = jax.tree.flatten(build(jnp.zeros((1, 16, 16, 1))))
        return structure, [(leaf.shape, np.asarray(leaf).tobytes()) for leaf in leaves]

    reference = network()
    assert reference == network()  # control
    for name, value in changes.items():
        assert network(**{name: value}) != reference, name


BAD = {
    "batch_size": [0, -1, 2.5, True, "many"],
    "num_epochs": [0],
    "lipschitz": ["sdp", ""],
    "power_iterations": [0],
    "power_iterations_eval": [0],
    "seeds": [(), (0, 0), (-1,), (0.5,), (2**31,), 3],
    "matmul_precision": ["bf16", ""],
    "precision": ["float16", ""],
    "accumulation": [0, 3, 2.0],
    "remat": [-1, True],
    "scan": [1],
    "data.name": ["cifar", 3],
    "data.data_dir": [None],
    "data.path": [1],
    "data.randaugment.probability": [-0.1, 1.5, "often"],
    "data.randaugment.num_ops": [0, 1.5],
    "data.randaugment.magnitude": [-1, 31, 9.5],
    "data.generated.path": [0],
    "data.generated.per_batch": [-1, 0.5],
    "data.generated.crop_padding": [-1],
    "data.generated.cache_dir": [None],
    "data.download": ["yes", 1],
    "data.validation_fraction": [-0.1, 1.0, float("nan"), "0.1"],
    "data.test_fraction": [1.5],
    "data.image_size": [-1],
    "data.crop_padding": [-1, 0.5],
    "data.flip": [1],
    "data.affine": [(1.0,), (-1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (float("inf"), 0.0, 0.0)],
    "model.name": [None],
    "model.depth": ["deep", 2.0],
    "model.block": [1, None],
    "model.width": [6.5],
    "model.stem_kernel": [None],
    "model.stem_strides": [1.0],
    "model.stem_padding": ["SAME"],
    "model.neck_features": [7.5],
    "model.head_normalize": [1],
    "model.neck": [1],
    "model.dense_depth": [1.5],
    "model.centering": [1],
    "model.small_init": ["yes"],
    "model.input_mean": ["zero", float("nan"), (0.5, "a")],
    "model.input_std": [0.0, -1.0, (0.5, 0.0)],
    "model.logit_scale": [-1.0, 1e9, 1e-9, "2"],
    "loss.name": ["hinge"],
    "loss.class_weights": ["auto", 1, ""],
    "loss.epsilon": [0.0, float("inf"), "36/255"],
    "loss.epsilon_start": [-1.0],
    "loss.epsilon_end": [0.0],
    "loss.epsilon_ramp": [1.5],
    "loss.trades_weight": [float("nan"), -1.0],
    "loss.gamma": [-0.1],
    "loss.curvature_weight": [-0.1, "large"],
    "loss.temperature": [0.0, float("inf")],
    "loss.radius": [0.0, -1.0],
    "loss.weight": [-1.0],
    "loss.weight_start_epoch": [-1, 2.5],
    "loss.weight_growth": [0.0, 2.1],
    "loss.radius_growth": [-1.0, 0.4],
    "loss.include_misclassified": [1],
    "loss.boosted": ["no"],
    "loss.offset": [-1.0],
    "loss.power": [0.5],
    "loss.slack": [0.0, 1.0],
    "loss.shift": [-0.1],
    "loss.two_sided": [1],
    "loss.margin": [0.0],
    "loss.alpha": [1.5, -0.1],
    "loss.penalty": [0.0],
    "train_head_only": [1],
    "init_from": [None],
    "optimizer.name": ["lion"],
    "optimizer.learning_rate": [0.0, float("nan"), -1.0],
    "optimizer.weight_decay": [-0.1],
    "optimizer.eps": [0.0, -1e-8],
    "optimizer.others": ["manifold_adam", "lbfgs"],
    "optimizer.orthogonal_rate": [0.0, -1.0],
    "optimizer.moments": ["euclidean?"],
    "optimizer.exponential": ["cayley"],
    "optimizer.decay_from": [-1.0],
    "optimizer.warmup_epochs": [-1.0, 100.0],
    "optimizer.final_fraction": [-1.0],
    "optimizer.clip_norm": [-1.0, float("inf")],
    "optimizer.lookahead_period": [-1, 2.5],
    "optimizer.lookahead_rate": [0.0, 1.5],
    "optimizer.schedule": ["linear"],
    "optimizer.decay": ["none", 1],
    "checkpoint.every_epochs": [0],
    "checkpoint.every_steps": [-1],
    "checkpoint.keep": [0],
    "certify.radii": [(), (0.0,), (-0.1,), (float("nan"),), 0.25, (0.25, 0.25 + 1e-9)],
    "certify.batch_size": [0],
    "certify.num_images": [-1],
    "certify.attack": ["fgsm", 1],
    "certify.attack_steps": [-1],
    "certify.attack_restarts": [0, 1.5],
    "certify.attack_objective": ["hinge"],
    "certify.attack_targets": [0],
    "certify.attack_queries": [0],
    "certify.attack_images": [-5],
    "mesh.data": [0, -2],
    "mesh.model": [0, -1],
    "data.workers": [-1, 0.5],
    "data.resample": ["area", 1],
    "compilation_cache": [1, "~/.cache"],
    "build_precision": ["tf32", 32],
    "certify.dtype": ["bfloat16", 64],
}


def test_a_bad_value_is_refused_by_the_name_of_its_field():
    # A new field needs an example of what it refuses.
    brought = {
        f"{choice.group}.{field}": {choice.noun: choice.owners(field)[0]}
        for choice in RECIPE
        for name in choice.names
        for field in choice.brings(name)
    }
    assert set(BAD) == {*FIELDS, *brought}
    for name, values in BAD.items():
        for value in values:
            config = default_config(**brought.get(name, {}))
            group, _, field = name.rpartition(".")
            owner = config[group] if group else config
            with owner.ignore_type():
                owner[field] = value
            with pytest.raises(UserError, match=rf"^config\.{name}: expected "):
                validate(config)
    validate(default_config())  # control
    config = default_config(schedule="exponential")
    config.optimizer.final_fraction = 0.0
    with pytest.raises(UserError, match="config.optimizer.final_fraction: expected .* above 0 for"):
        validate(config)
    config = default_config()
    config.train_head_only = True
    with pytest.raises(UserError, match="config.init_from: expected a run, for train_head_only"):
        validate(config)


def test_what_was_taken_out_is_refused_with_the_reason(tmp_path):
    config = tiny_config(lipschitz="grid")
    with pytest.raises(UserError, match='"grid" is not there any more, because it made networks worse'):
        validate(config)
    (tmp_path / "config.json").write_text(json.dumps({"config": same_run.plain(config), "seed": 0}))
    with pytest.raises(UserError, match="trained with it needs the lipjax that trained it"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="config.optimizer.schedule: expected one of"):
        validate(tiny_config(**{"optimizer.schedule": "triangle"}))
    config = default_config()
    config.model = ConfigDict({"name": "convnet", "variant": "9c2f"})
    with pytest.raises(UserError, match="expected variant to be one of"):
        get_model(config.model, input_shape=(32, 32, 3), num_classes=10)


def test_unknown_and_missing_fields_are_refused():
    config = default_config()
    config.loss.epsilom = 1.0
    with pytest.raises(
        UserError, match=r"config.loss.epsilom: expected no such field; the fields here are \[.*'epsilon'"
    ):
        validate(config)
    config = default_config()
    del config.optimizer["clip_norm"]
    with pytest.raises(UserError, match="config.optimizer.clip_norm: expected to be set"):
        validate(config)
    config = default_config()
    config.model.columns = 3  # which fields a model has is its own business
    validate(config)
    with pytest.raises(UserError, match="config.model does not describe a liresnet.*columns"):
        get_model(config.model, input_shape=(8, 8, 1), num_classes=3)


def test_groups_have_the_fields_of_their_own_choice():
    """Of every loss, optimizer and schedule; what two of them share keeps its value when the choice changes."""
    for choice in RECIPE:
        others = {field for name in choice.names for field in choice.brings(name)}
        for name in choice.names:
            config = default_config(**{choice.noun: name})
            own = choice.brings(name)
            assert config[choice.group][choice.field] == name and others & set(config[choice.group]) == set(own)
            assert all(config[choice.group][field] == setting.default for field, setting in own.items())
            validate(config)
    config = default_config(loss="margin")
    config.loss.update({"epsilon": 0.25, "epsilon_end": 1.5})
    update(config, {"loss.name": "gloro", "optimizer.name": "sgd", "optimizer.schedule": "step"})
    assert (config.loss.epsilon, config.loss.epsilon_end) == (0.25, 1.5)
    update(config, {"loss.weight": 3.0, "loss.name": "crm"})  # in any order
    assert (config.loss.epsilon, config.loss.weight) == (0.25, 3.0) and "epsilon_end" not in config.loss
    assert "eps" not in config.optimizer and "final_fraction" not in config.optimizer
    update(config, {"loss.name": "emma", "optimizer.name": "nadam", "optimizer.schedule": "cosine"})
    assert (config.loss.epsilon, config.loss.epsilon_end, config.optimizer.eps) == (0.25, 3.0, 1e-8)
    # Defaults are not shared between configs, those that may be None included.
    one, other = (default_config(model="lipconvnet") for _ in range(2))
    one.model.train_terms = None
    assert other.model.train_terms == 5
    with pytest.raises(UserError, match=r"config.loss.name: expected one of \['certificate_regularization'"):
        default_config(loss="hinge")


def test_a_field_of_another_choice_is_refused_with_the_choice_that_brings_it():
    config = default_config()
    config.loss.name = "crm"  # without its fields
    with pytest.raises(
        UserError, match=r'config.loss.boosted: expected to be set \(start from default_config\(loss="crm"\)\)'
    ):
        validate(config)
    config = default_config()
    config.loss.weight_growth = 3.0
    with pytest.raises(UserError, match=r'the loss crm, crm_max has it: default_config\(loss="crm"\) brings it'):
        validate(config)


def older(config, **fields):
    """A config as lipjax saved it before losses and optimizers had fields of their own."""
    saved = same_run.plain(config)
    everything = {"epsilon_start": 0.1, "epsilon_end": 2.0, "epsilon_ramp": 0.5, "trades_weight": 1.0, "gamma": 0.0}
    everything |= {"curvature_weight": 0.01, "temperature": 5.0, "radius": 0.2, "weight": 15.0, "boosted": False}
    saved["loss"] = everything | saved["loss"]
    saved["optimizer"] = {"decay_from": 0.0, "eps": 1e-8, "final_fraction": 1e-5} | saved["optimizer"]
    return {"config": saved, "seed": 0, **fields}


def test_a_config_of_an_older_run_loads_and_its_run_goes_on(tmp_path):
    config = tiny_config(**{"loss.name": "crm", "optimizer.name": "sgd", "loss.weight": 3.0})
    (tmp_path / "config.json").write_text(json.dumps(older(config)))
    loaded, _ = load_config(tmp_path)
    assert loaded == config and "gamma" not in loaded.loss and "eps" not in loaded.optimizer
    same_run.check_same_run(tmp_path, older(config), config, 0)
    for field, value in (("loss.weight", 4.0), ("loss.name", "crm_max"), ("loss.name", "emma")):  # controls
        changes = {"loss.name": "crm", "loss.weight": 3.0} if field == "loss.weight" else {}
        other = tiny_config(**{**changes, field: value, "optimizer.name": "sgd"})
        with pytest.raises(UserError, match=rf"holds a run with another config \(config\.{field}: "):
            same_run.check_same_run(tmp_path, older(config), other, 0)
    unknown = older(config)
    unknown["config"]["loss"]["temperatur"] = 1.0
    (tmp_path / "config.json").write_text(json.dumps(unknown))
    with pytest.raises(UserError, match="temperatur"):
        load_config(tmp_path)
    # A model that was given without its defaults is the same as with them.
    config, bare = default_config(model="lipconvnet"), default_config()
    config.model.update({"depth": 10, "input_mean": (0.0,)})
    bare.model = ConfigDict({"name": "lipconvnet", "depth": 10})
    same_run.check_same_run(tmp_path, {"config": same_run.plain(bare), "seed": 0}, config, 0)
    config.model.input_mean = (0.5,)
    with pytest.raises(UserError, match="model.input_mean"):
        same_run.check_same_run(tmp_path, {"config": same_run.plain(bare), "seed": 0}, config, 0)


def test_a_saved_config_comes_back_equal(tmp_path):
    config = tiny_config(**{"certify.radii": (36 / 255,), "seeds": (0, 4)})
    (tmp_path / "config.json").write_text(json.dumps({"config": same_run.plain(config), "seed": 4}))
    loaded, seed = load_config(tmp_path)
    assert loaded == config and seed == 4
    assert loaded.is_locked and loaded.certify.radii == (36 / 255,)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"config": {}}', '{"config": {"model": {"name": "x"}, "los": 1}, "seed": 0}']
)
def test_a_damaged_saved_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="damaged or of another version|no such field"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="holds no training run"):
        load_config(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": made_up_images(60)[0] / 255}, "as uint8"),
        ({"images": made_up_images(60)[0] // 255}, "hold nothing above 1"),
        ({"test_images": np.full((15, 9, 9, 1), 7, np.uint8)}, "test_images are"),
    ],
)
def test_images_of_another_type_range_or_size_are_refused(arrays, message):
    config = tiny_config(**{"data.path": str(npz_file("bad", **arrays))})
    with pytest.raises(UserError, match=message):
        loop.Run(config, 0)
    assert scratch().exists()
