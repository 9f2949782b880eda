"""The fields of a config, their defaults, and the checks that run before any work."""

import json
import math
import os
import pathlib
from typing import Any

import ml_collections
from ml_collections import config_dict

from lipjax import attacks
from lipjax.errors import UserError
from lipjax.training import optimizer
from lipjax.training.data import NAMES
from lipjax.training.report import radius_key
from lipjax.training.step import CURVATURE, LIPSCHITZ, LOSSES

PRECISIONS = ("default", "high", "highest")


def default_config() -> Any:
    """All fields with their defaults; a config file changes some and locks the result.

    Radii are l2 in [0, 1]-pixel units.
    """
    config = ml_collections.ConfigDict()
    config.seeds = (0,)  # one run per seed: of the initialisation, the batches and the train/validation split
    config.batch_size = 256  # global, whatever the number of devices
    config.num_epochs = 100
    config.matmul_precision = "default"  # of the forward and backward pass; norms are estimated at the highest
    config.train_head_only = False  # keep all but the head as config.init_from left it
    config.init_from = ""  # directory of a finished run of the same layers, whose best checkpoint training starts from
    config.lipschitz = "product"  # what estimates L in training and validation: the product of norms, or "liplt"
    config.power_iterations = 10  # per training step, warm-started
    config.power_iterations_eval = 100  # before a validation

    config.data = ml_collections.ConfigDict()
    config.data.name = "digits"
    config.data.data_dir = ""  # of prepared data sets; "": $TFDS_DATA_DIR, or ~/tensorflow_datasets
    config.data.path = ""  # of the user's own data: an .npz file, or a folder with a folder per class
    config.data.download = False
    config.data.validation_fraction = 0.1  # of the training images; keep-best selects on them
    config.data.test_fraction = 0.2  # of all images, for sets without a test split of their own
    config.data.image_size = 0  # ImageNet's, in pixels; 0: 224 there, and the size that the images have elsewhere
    config.data.crop_padding = 0  # random crops after zero padding of this many pixels
    config.data.flip = False  # random horizontal flips
    config.data.affine = (0.0, 0.0, 0.0)  # random rotation (degrees), scale and shift (fractions), each up to +-

    config.model = ml_collections.ConfigDict()
    config.model.name = "liresnet"
    config.model.depth = 12
    config.model.width = 512
    config.model.stem_kernel = 5
    config.model.stem_strides = 2
    config.model.stem_padding = 2
    config.model.neck_features = config_dict.placeholder(int)  # None: 4 * width
    config.model.head_normalize = True
    config.model.neck = "free"  # or "cholesky": contractive maps
    config.model.dense_depth = 0  # contractive dense layers after the neck
    config.model.centering = False  # subtract running means from what the blocks add
    config.model.small_init = False  # blocks start nearer to the identity
    config.model.input_mean = (0.5,)  # one number, or one per channel; pixel units
    config.model.input_std = (1.0,)

    config.loss = ml_collections.ConfigDict()
    config.loss.name = "emma"
    config.loss.epsilon = 36 / 255  # the radius that validation certifies at
    config.loss.epsilon_start = 0.1  # training radius as a multiple of epsilon, in the first epoch
    config.loss.epsilon_end = 3.0  # and from epsilon_ramp on
    config.loss.epsilon_ramp = 0.5  # fraction of the epochs over which it rises linearly
    config.loss.trades_weight = 1.0  # lambda, read by the loss "trades"
    config.loss.gamma = 0.0  # weight of the certified radius, read by the loss "certificate_regularization"
    config.loss.curvature_weight = 0.01  # beta, read by the loss "curvature", for models with an MLP head
    # Read by the losses "crm" and "crm_max".
    config.loss.temperature = 5.0  # t of the soft minimum of the radii, in 1 / pixel unit
    config.loss.radius = 0.2  # r_0: only images certified below this radius are penalised
    config.loss.weight = 15.0  # lambda of the penalty
    config.loss.weight_start_epoch = 10  # lambda is 0 in that many epochs
    config.loss.weight_growth = 1.0  # factor of lambda per epoch, from then on
    config.loss.radius_growth = 1.0  # likewise of r_0
    config.loss.include_misclassified = False  # penalise wrongly classified images too, which makes them robustly wrong
    config.loss.boosted = False  # cross-entropy that also pushes down the largest wrong probability

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.eps = 1e-8  # in the denominator of adam, adamw, nadam and nadamw
    config.optimizer.schedule = "cosine"
    config.optimizer.decay_from = 0.0  # epochs; read by the schedule "exponential", which is constant until then
    config.optimizer.weight_decay = 0.0
    config.optimizer.decay = "all"  # what weight decay shrinks: all but activations' angles, or only the "weights"
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.final_fraction = 1e-5  # of the learning rate, at the end of the schedule
    config.optimizer.clip_norm = 3.0  # global norm of the gradients; 0: no clipping
    config.optimizer.lookahead_period = 0  # steps between synchronisations of Lookahead; 0: no Lookahead
    config.optimizer.lookahead_rate = 0.5  # the part of the way that its slow parameters go

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every_epochs = 1  # validation and save
    config.checkpoint.every_steps = 0  # saves in between, for long epochs; 0: none
    config.checkpoint.keep = 2  # last ones, beside the best

    config.certify = ml_collections.ConfigDict()
    config.certify.radii = (36 / 255, 72 / 255, 108 / 255)
    config.certify.batch_size = 250
    config.certify.num_images = 0  # of the test set, the first ones; 0 for all
    config.certify.attack = "apgd"  # or "pgd"
    config.certify.attack_steps = 50
    config.certify.attack_restarts = 1
    config.certify.attack_images = 0  # as num_images, for the attack

    config.mesh = ml_collections.ConfigDict({"data": -1})  # devices along the batch; -1 for all
    return config


def _check(condition: bool, field: str, expected: str, value) -> None:
    if not condition:
        raise UserError(f"config.{field}: expected {expected}, got {value!r}.")


def validate(config) -> None:
    """Raises: UserError naming the first field that does not exist or whose value cannot be used."""
    defaults = default_config()
    _check_types(config, defaults, "")
    for field in ("batch_size", "num_epochs", "power_iterations", "power_iterations_eval"):
        _check(config[field] >= 1, field, "at least 1", config[field])
    seeds = config.seeds
    _check(
        len(seeds) > 0 and len(set(seeds)) == len(seeds) and all(type(s) is int and 0 <= s < 2**31 for s in seeds),
        "seeds",
        "different integers in [0, 2**31), such as (0, 1, 2)",
        seeds,
    )
    _check(config.matmul_precision in PRECISIONS, "matmul_precision", f"one of {PRECISIONS}", config.matmul_precision)
    _check(config.lipschitz in LIPSCHITZ, "lipschitz", f"one of {LIPSCHITZ}", config.lipschitz)
    for field in ("validation_fraction", "test_fraction"):
        _check(0 <= config.data[field] < 1, f"data.{field}", "a fraction in [0, 1)", config.data[field])
    _check(config.data.image_size >= 0, "data.image_size", "0 or a number of pixels", config.data.image_size)
    _check(config.data.name in NAMES, "data.name", f"one of {NAMES}", config.data.name)
    _check(config.data.crop_padding >= 0, "data.crop_padding", "at least 0 pixels", config.data.crop_padding)
    _check(
        len(config.data.affine) == 3
        and all(0 <= a < math.inf for a in config.data.affine)
        and config.data.affine[1] < 1,
        "data.affine",
        "three numbers >= 0 (degrees, scale, shift), scale below 1",
        config.data.affine,
    )
    std = config.model.input_std if "input_std" in config.model else 1.0
    positive = all(1e-30 < s < 1e30 for s in (std if isinstance(std, tuple) else (std,)))
    _check(positive, "model.input_std", "positive float32 numbers, one or one per channel", std)
    names = sorted([*LOSSES, CURVATURE])
    _check(config.loss.name in names, "loss.name", f"one of {names}", config.loss.name)
    for field in ("epsilon", "epsilon_end", "temperature", "radius"):
        _check(0 < config.loss[field] < math.inf, f"loss.{field}", "a positive number", config.loss[field])
    for field in ("weight_growth", "radius_growth"):
        factor = config.loss[field]
        moderate = factor > 0 and config.num_epochs * abs(math.log10(factor)) < 30
        _check(moderate, f"loss.{field}", "a positive factor per epoch that stays within 1e30 over all of them", factor)
    for field in ("epsilon_start", "trades_weight", "gamma", "curvature_weight", "weight", "weight_start_epoch"):
        _check(config.loss[field] >= 0, f"loss.{field}", "at least 0", config.loss[field])
    _check(0 <= config.loss.epsilon_ramp <= 1, "loss.epsilon_ramp", "a fraction in [0, 1]", config.loss.epsilon_ramp)
    names = sorted(optimizer.OPTIMIZERS)
    _check(config.optimizer.name in names, "optimizer.name", f"one of {names}", config.optimizer.name)
    _check(0 < config.optimizer.learning_rate, "optimizer.learning_rate", "positive", config.optimizer.learning_rate)
    for field, known in (("schedule", optimizer.SCHEDULES), ("decay", optimizer.DECAYED)):
        _check(config.optimizer[field] in known, f"optimizer.{field}", f"one of {known}", config.optimizer[field])
    _check(0 < config.optimizer.eps, "optimizer.eps", "positive", config.optimizer.eps)
    for field in ("weight_decay", "warmup_epochs", "decay_from", "final_fraction", "clip_norm"):
        _check(0 <= config.optimizer[field] < math.inf, f"optimizer.{field}", "at least 0", config.optimizer[field])
    period, rate = config.optimizer.lookahead_period, config.optimizer.lookahead_rate
    _check(period >= 0, "optimizer.lookahead_period", "at least 0", period)
    _check(0 < rate <= 1, "optimizer.lookahead_rate", "a fraction in (0, 1]", rate)
    ends = config.optimizer.final_fraction > 0 or config.optimizer.schedule != "exponential"
    _check(ends, "optimizer.final_fraction", 'above 0 for the schedule "exponential"', config.optimizer.final_fraction)
    for field in ("every_epochs", "keep"):
        _check(config.checkpoint[field] >= 1, f"checkpoint.{field}", "at least 1", config.checkpoint[field])
    _check(config.checkpoint.every_steps >= 0, "checkpoint.every_steps", "at least 0", config.checkpoint.every_steps)
    radii = config.certify.radii
    keys = {radius_key(r) for r in radii}
    distinct = len(radii) > 0 and len(keys) == len(radii) and all(0 < r < math.inf for r in radii)
    _check(distinct, "certify.radii", "positive numbers, at least one, that differ in six digits", radii)
    for field in ("num_images", "attack_steps", "attack_images"):
        _check(config.certify[field] >= 0, f"certify.{field}", "at least 0", config.certify[field])
    for field in ("batch_size", "attack_restarts"):
        _check(config.certify[field] >= 1, f"certify.{field}", "at least 1", config.certify[field])
    _check(
        config.certify.attack in attacks.METHODS, "certify.attack", f"one of {attacks.METHODS}", config.certify.attack
    )
    _check(config.mesh.data == -1 or config.mesh.data >= 1, "mesh.data", "-1 or a number of devices", config.mesh.data)


def _check_types(config, defaults, prefix: str) -> None:
    a_model = prefix == "model."  # which models have which attributes they check themselves
    for field in () if a_model else defaults:
        _check(field in config, f"{prefix}{field}", "to be set (start from default_config())", None)
    for field, value in config.items():
        name = f"{prefix}{field}"
        if a_model and field not in defaults:
            continue
        _check(field in defaults, name, f"no such field; the fields here are {sorted(defaults)}", value)
        default = defaults[field]
        if isinstance(default, ml_collections.ConfigDict):
            _check(isinstance(value, ml_collections.ConfigDict), name, "a group of fields", value)
            _check(field != "model" or "name" in value, "model.name", "the name of a model", None)
            _check_types(value, default, f"{name}.")
        elif isinstance(default, tuple):
            values = (value,) if a_model and _is_number(value) else value
            numbers = isinstance(values, tuple) and all(_is_number(v) for v in values)
            _check(numbers, name, "a tuple of numbers, such as (0.25, 0.5)", value)
        elif isinstance(default, float):
            _check(_is_number(value), name, "a finite number", value)
        elif default is None:  # an integer that may be left out
            _check(value is None or type(value) is int, name, "an integer or None", value)
        else:
            _check(type(value) is type(default), name, f"a value of type {type(default).__name__}", value)


def _is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def load_config(workdir: str | os.PathLike) -> tuple[Any, int]:
    """The config and seed that a run's directory records.

    Raises: UserError if the directory holds no run, or the file is damaged.
    """
    path = pathlib.Path(workdir) / "config.json"
    try:
        document = json.loads(path.read_text())
        config, seed = document["config"], document["seed"]
        if type(seed) is not int or seed < 0:
            raise ValueError(f"seed {seed!r}")
        loaded = default_config()
        model = config.pop("model")
        loaded.model = type(loaded)({name: _tuples(value) for name, value in model.items()})
        _update(loaded, config)
    except FileNotFoundError as error:
        raise UserError(
            f"{workdir} holds no training run ({path.name} is missing): give the --workdir of one."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged or of another version ({error}).") from error
    loaded.lock()
    validate(loaded)
    return loaded, seed


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _update(target, values: dict) -> None:
    for field, value in values.items():
        if isinstance(value, dict):
            _update(target[field], value)
        else:
            setattr(target, field, _tuples(value))
