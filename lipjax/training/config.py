"""The fields of a config, their defaults, and the checks that run before any work."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from lipjax import _precision, attacks, network
from lipjax.certify.layout import DTYPES
from lipjax.certify.radius import radius_key
from lipjax.errors import UserError
from lipjax.training.accumulate import centering_refused
from lipjax.training.choices import CHOICES, LAYER, RECIPE, without_others
from lipjax.training.data import NAMES
from lipjax.training.data.stream import RESAMPLE
from lipjax.training.optimizer import DECAYED
from lipjax.training.randaugment import MAX_MAGNITUDE
from lipjax.training.step import CLASS_WEIGHTS, LIPSCHITZ

MATMUL_PRECISIONS = ("default", "high", "highest")


def default_config(
    model: str = "liresnet",
    loss: str = "emma",
    optimizer: str = "adamw",
    schedule: str = "cosine",
    layer: str | None = None,
) -> Any:
    """All fields with their defaults; a config file changes some and locks the result.

    Radii are l2 in [0, 1]-pixel units.

    Args: names of `CHOICES`, which say what fields config.model, config.loss and config.optimizer have. layer: None:
      the model's own default.
    Raises: UserError for a name that is not known, and for a layer of a model that has none to choose.
    """
    config = ml_collections.ConfigDict()
    # One run per seed, which decides the start, the batches, the validation split, and a test split if there is none.
    config.seeds = (0,)
    config.batch_size = 256  # global, whatever the number of devices
    config.num_epochs = 100  # passes over the real training images
    config.matmul_precision = "default"  # or "high", "highest": of forward and backward pass; norms: the highest
    config.precision = "float32"  # or "bfloat16": of activations in training steps; all else is float32
    # Products of parametrisations in training steps on GPUs: "tf32x3" and "bfloat16x6" run on tensor cores, in parts.
    config.build_precision = "float32"
    config.accumulation = 1  # micro-batches that a step divides its batch into, one after the other, to save memory
    config.remat = 0  # consecutive layers rematerialised as one group (only its input is stored); 0: all are stored
    config.scan = False  # loops over equal layers and micro-batches, which compile sooner: for accelerators
    config.train_head_only = False  # keep all but the head as config.init_from left it
    config.init_from = ""  # directory of a finished run of the same layers, whose best checkpoint training starts from
    config.lipschitz = "product"  # what estimates L in training and validation: the product of norms, or "liplt"
    config.power_iterations = 10  # per training step, warm-started
    config.power_iterations_eval = 100  # before a validation
    # Keep compiled programs for later starts, in ~/.cache/lipjax/jax, or where JAX_COMPILATION_CACHE_DIR says.
    config.compilation_cache = True

    config.data = ml_collections.ConfigDict()
    config.data.name = "digits"  # docs/data.md lists them
    config.data.data_dir = ""  # of prepared data sets; "": $TFDS_DATA_DIR, or ~/tensorflow_datasets
    config.data.path = ""  # of the user's own data: an .npz file, or a folder with a folder per class
    config.data.download = False  # prepare a missing data set when the run starts
    config.data.workers = 0  # processes that read and decode streamed images (ImageNet); 0: threads of this one
    config.data.resample = "bilinear"  # of streamed images' training crops, or "nearest": docs/plan.md
    config.data.validation_fraction = 0.1  # of the training images; keep-best selects on them
    config.data.test_fraction = 0.2  # of all images, for sets without a test split of their own
    config.data.image_size = 0  # pixels that the centre square is resized to; 0: 224 for ImageNet, others stay
    config.data.crop_padding = 0  # random crops after zero padding of this many pixels
    config.data.flip = False  # random horizontal flips
    config.data.affine = (0.0, 0.0, 0.0)  # random rotation (degrees), scale and shift (fractions), each up to +-
    config.data.randaugment = ml_collections.ConfigDict()
    config.data.randaugment.probability = 0.0  # of RandAugment, for each real image
    config.data.randaugment.num_ops = 2  # operations, one after the other
    config.data.randaugment.magnitude = 9  # of them, 0 ... 30
    # Generated images to train on beside the real ones; an epoch is one pass over the real ones.
    config.data.generated = ml_collections.ConfigDict()
    config.data.generated.path = ""  # an .npz file, or a folder that TFDS prepared; "": none, whatever per_batch says
    config.data.generated.per_batch = 0  # how many of the batch_size images of a step are generated
    config.data.generated.crop_padding = 0  # as data.crop_padding; data.flip is for both, nothing else for these
    config.data.generated.cache_dir = ""  # where the images of a compressed .npz are unpacked to; "": beside it

    config.model = ml_collections.ConfigDict()
    config.model.name = "liresnet"  # or another of those below, with its attributes; these are liresnet's:
    config.model.depth = 12  # residual blocks
    config.model.width = 512  # channels
    config.model.stem_kernel = 5  # pixels along a side
    config.model.stem_strides = 2  # pixels
    config.model.stem_padding = 2  # zeros on every side
    config.model.neck_features = config_dict.placeholder(int)  # None: 4 * width
    config.model.head_normalize = True  # rows of length 1 (LLN)
    config.model.neck = "free"  # or "cholesky": contractive maps
    config.model.dense_depth = 0  # contractive dense layers after the neck
    config.model.centering = False  # subtract running means from what the blocks add
    config.model.small_init = False  # blocks start nearer to the identity
    config.model.block = "linear"  # or "conventional": x + MaxMin(convolution)
    config.model.input_mean = (0.5,)  # one number, or one per channel; pixel units
    config.model.input_std = (1.0,)  # likewise
    config.model.logit_scale = 0.0  # where a learned factor of logits and L in losses starts; 0: there is none

    config.loss = ml_collections.ConfigDict()
    config.loss.name = "emma"  # docs/training.md lists them; it brings fields of its own
    # Whether images of rare classes count for more, in training and validation: "balanced": all classes count alike.
    config.loss.class_weights = "none"
    config.loss.epsilon = 36 / 255  # the radius that validation certifies at

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adamw"  # or "adam", "nadam", "nadamw", "sgd", "manifold_adam"; it may bring fields
    config.optimizer.learning_rate = 1e-3  # the largest of the schedule
    config.optimizer.schedule = "cosine"  # or another of those below, from the warm-up on; likewise
    config.optimizer.weight_decay = 0.0  # decoupled in adamw and nadamw; added to the gradient (L2) in the others
    config.optimizer.decay = "all"  # what weight decay shrinks: all but activations' angles, or only the "weights"
    config.optimizer.warmup_epochs = 1.0  # of linear growth
    config.optimizer.clip_norm = 3.0  # global norm of the gradients; 0: no clipping
    config.optimizer.lookahead_period = 0  # steps between synchronisations of Lookahead; 0: no Lookahead
    config.optimizer.lookahead_rate = 0.5  # the part of the way that its slow parameters go

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every_epochs = 1  # validation and save
    config.checkpoint.every_steps = 0  # saves in between, for long epochs; 0: none
    config.checkpoint.keep = 2  # last ones, beside the best

    config.certify = ml_collections.ConfigDict()
    config.certify.radii = (36 / 255, 72 / 255, 108 / 255)  # of the accuracies in the report
    config.certify.batch_size = 250  # images at a time
    config.certify.num_images = 0  # of the test set, drawn by hash; 0 for all
    config.certify.dtype = "float64"  # of the frozen arrays; "float32": rounded before the proof, half the size
    # Auto-PGD on the cross-entropy, then towards rivals, then Square: an "ensemble"; or "apgd", "pgd", "square" alone.
    config.certify.attack = "ensemble"
    config.certify.attack_steps = 20  # gradients of every start of an attack; 0: nothing is attacked
    config.certify.attack_restarts = 1  # random starts
    config.certify.attack_targets = 3  # the likeliest rivals, towards which the "ensemble" and targeted objectives go
    config.certify.attack_queries = 100  # of the network by "square", alone or in the "ensemble"
    config.certify.attack_objective = "cross_entropy"  # what "apgd" and "pgd" ascend alone: docs/attacks.md
    config.certify.attack_images = 0  # as num_images, for the attack

    # The batch is divided over data x model devices, and what is trained is stored in `model` parts.
    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1  # as many as there are
    config.mesh.model = 1  # 1: all is stored whole
    for choice, name in zip(CHOICES, (model, loss, optimizer, schedule, layer), strict=True):
        if name is None and choice is LAYER:
            continue
        _check(str(name) in choice.names, choice.path, f"one of {sorted(choice.names)}", name)
        group: Any = config[choice.group]
        _check(choice.field in group, choice.path, f"nothing, since {model} has its own layers", name)
        choice.choose(config, str(name))
    return config


def defaults_for(values: Mapping[str, Any]) -> Any:
    """The defaults of a config that is given as nested mappings, by its own choices.

    Raises: UserError for a choice that is not known.
    """
    names = [choice.chosen(values) for choice in CHOICES]
    known = {choice.noun: name for choice, name in zip(CHOICES, names, strict=True) if name is not None}
    return default_config(**known)


def _check(condition: bool, field: str, expected: str, value) -> None:
    if not condition:
        raise UserError(f"config.{field}: expected {expected}, got {value!r}.")


def validate(config) -> None:
    """Raises: UserError naming the first field that does not exist or whose value cannot be used."""
    for choice in RECIPE:
        name = choice.chosen(config)
        _check(str(name) in choice.names, choice.path, f"one of {sorted(choice.names)}", name)
    # Which models have which attributes they check themselves.
    defaults = defaults_for({name: value for name, value in config.items() if name in ("loss", "optimizer")})
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
    _check(
        config.matmul_precision in MATMUL_PRECISIONS,
        "matmul_precision",
        f"one of {MATMUL_PRECISIONS}",
        config.matmul_precision,
    )
    _check(
        config.precision in network.ACTIVATION_PRECISIONS,
        "precision",
        f"one of {network.ACTIVATION_PRECISIONS}",
        config.precision,
    )
    _check(
        config.build_precision in _precision.PRODUCTS,
        "build_precision",
        f"one of {tuple(_precision.PRODUCTS)}",
        config.build_precision,
    )
    count = config.accumulation
    divides = count >= 1 and config.batch_size % count == 0
    _check(divides, "accumulation", f"a divisor of config.batch_size = {config.batch_size}", count)
    if count > 1 and "centering" in config.model and config.model.centering is True:
        raise UserError(centering_refused(count))
    _check(config.remat >= 0, "remat", "0 or a number of layers", config.remat)
    _check(not config.train_head_only or config.init_from != "", "init_from", "a run, for train_head_only", "")
    if config.lipschitz == "grid":
        raise UserError(
            'config.lipschitz: "grid" is not there any more, because it made networks worse (docs/bound_quality.md): '
            'train with "product". A run that was trained with it needs the lipjax that trained it.'
        )
    _check(config.lipschitz in LIPSCHITZ, "lipschitz", f"one of {LIPSCHITZ}", config.lipschitz)
    for field in ("validation_fraction", "test_fraction"):
        _check(0 <= config.data[field] < 1, f"data.{field}", "a fraction in [0, 1)", config.data[field])
    _check(config.data.image_size >= 0, "data.image_size", "0 or a number of pixels", config.data.image_size)
    _check(config.data.name in NAMES, "data.name", f"one of {NAMES}", config.data.name)
    _check(config.data.workers >= 0, "data.workers", "0 or a number of processes", config.data.workers)
    _check(config.data.resample in RESAMPLE, "data.resample", f"one of {RESAMPLE}", config.data.resample)
    _check(config.data.crop_padding >= 0, "data.crop_padding", "at least 0 pixels", config.data.crop_padding)
    _check(
        len(config.data.affine) == 3
        and all(0 <= a < math.inf for a in config.data.affine)
        and config.data.affine[1] < 1,
        "data.affine",
        "three numbers >= 0 (degrees, scale, shift), scale below 1",
        config.data.affine,
    )
    randaugment, generated = config.data.randaugment, config.data.generated
    _check(0 <= randaugment.probability <= 1, "data.randaugment.probability", "in [0, 1]", randaugment.probability)
    _check(randaugment.num_ops >= 1, "data.randaugment.num_ops", "at least 1", randaugment.num_ops)
    known = f"0 ... {MAX_MAGNITUDE}"
    _check(0 <= randaugment.magnitude <= MAX_MAGNITUDE, "data.randaugment.magnitude", known, randaugment.magnitude)
    least = 1 if generated.path else 0
    _check(
        least <= generated.per_batch < (config.batch_size if least else math.inf),
        "data.generated.per_batch",
        f"at least {least} and less than config.batch_size, which counts all images of a step",
        generated.per_batch,
    )
    _check(generated.crop_padding >= 0, "data.generated.crop_padding", "at least 0 pixels", generated.crop_padding)
    std = config.model.input_std if "input_std" in config.model else 1.0
    positive = all(1e-30 < s < 1e30 for s in (std if isinstance(std, tuple) else (std,)))
    _check(positive, "model.input_std", "positive float32 numbers, one or one per channel", std)
    scale = config.model.logit_scale if "logit_scale" in config.model else 0.0
    _check(scale == 0 or 1e-6 <= scale <= 1e6, "model.logit_scale", "0 or between 1e-6 and 1e6", scale)
    weights = config.loss.class_weights
    _check(weights in CLASS_WEIGHTS, "loss.class_weights", f"one of {CLASS_WEIGHTS}", weights)
    _check(0 < config.loss.epsilon < math.inf, "loss.epsilon", "a positive number", config.loss.epsilon)
    _check(0 < config.optimizer.learning_rate, "optimizer.learning_rate", "positive", config.optimizer.learning_rate)
    _check(config.optimizer.decay in DECAYED, "optimizer.decay", f"one of {DECAYED}", config.optimizer.decay)
    for field in ("weight_decay", "warmup_epochs", "clip_norm"):
        _check(0 <= config.optimizer[field] < math.inf, f"optimizer.{field}", "at least 0", config.optimizer[field])
    warmup, epochs = config.optimizer.warmup_epochs, config.num_epochs
    _check(warmup < epochs or epochs == 1, "optimizer.warmup_epochs", f"less than config.num_epochs = {epochs}", warmup)
    period, rate = config.optimizer.lookahead_period, config.optimizer.lookahead_rate
    _check(period >= 0, "optimizer.lookahead_period", "at least 0", period)
    _check(0 < rate <= 1, "optimizer.lookahead_rate", "a fraction in (0, 1]", rate)
    for choice in RECIPE:
        for field, setting in choice.brings(config[choice.group][choice.field]).items():
            value = config[choice.group][field]
            _check(setting.good(value, config), f"{choice.group}.{field}", setting.expected, value)
    for field in ("every_epochs", "keep"):
        _check(config.checkpoint[field] >= 1, f"checkpoint.{field}", "at least 1", config.checkpoint[field])
    _check(config.checkpoint.every_steps >= 0, "checkpoint.every_steps", "at least 0", config.checkpoint.every_steps)
    radii = config.certify.radii
    keys = {radius_key(r) for r in radii}
    distinct = len(radii) > 0 and len(keys) == len(radii) and all(0 < r < math.inf for r in radii)
    _check(distinct, "certify.radii", "positive numbers, at least one, that differ in six digits", radii)
    for field in ("num_images", "attack_steps", "attack_images"):
        _check(config.certify[field] >= 0, f"certify.{field}", "at least 0", config.certify[field])
    for field in ("batch_size", "attack_restarts", "attack_targets", "attack_queries"):
        _check(config.certify[field] >= 1, f"certify.{field}", "at least 1", config.certify[field])
    choices = ("attack", attacks.METHODS), ("attack_objective", attacks.OBJECTIVES), ("dtype", DTYPES)
    for field, names in choices:
        _check(config.certify[field] in names, f"certify.{field}", f"one of {names}", config.certify[field])
    _check(config.mesh.data == -1 or config.mesh.data >= 1, "mesh.data", "-1 or a number of devices", config.mesh.data)
    _check(config.mesh.model >= 1, "mesh.model", "a number of parts, at least 1", config.mesh.model)


def _check_types(config, defaults, prefix: str) -> None:
    a_model = prefix == "model."  # which models have which attributes they check themselves
    for field in () if a_model else defaults:
        asked = [
            f'{c.noun}="{config[c.field]}"'
            for c in CHOICES
            if c.group == prefix[:-1] and field in c.own(config[c.field])
        ]
        expected = f"to be set (start from default_config({', '.join(asked)}))"
        _check(field in config, f"{prefix}{field}", expected, None)
    for field, value in config.items():
        name = f"{prefix}{field}"
        if a_model and field not in defaults:
            continue
        _check(field in defaults, name, f"no such field{_whose(name)}; the fields here are {sorted(defaults)}", value)
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


def _whose(name: str) -> str:
    """Names the other choices that bring a field, if any."""
    group, _, field = name.rpartition(".")
    found = [(choice, choice.owners(field)) for choice in CHOICES if choice.group == group]
    return "".join(
        f' (the {choice.noun} {", ".join(owners)} has it: default_config({choice.noun}="{owners[0]}") brings it)'
        for choice, owners in found
        if owners
    )


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
        config = without_others(config)
        loaded = defaults_for(config)
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
