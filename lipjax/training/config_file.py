"""From --config=NAME and --config.field=value to a config: files by path or by name, in any order, help for typos.

A config file defines get_config() -> ConfigDict. A family of configs defines get_config(variant), which gets what
follows a colon, as in --config=liresnet:cifar10, and VARIANTS, a line about each variant by its name; the name "help"
lists them. A config file may define adapt(config, data) as well, which sets fields by what
is at hand, such as the size of the user's images: data is the group config.data as the flags say, and fields that
flags set stay as they are.
"""

import difflib
import inspect
import os
import pathlib
import re
import types
import typing
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

import lipjax
from lipjax.errors import UserError
from lipjax.training.choices import CHOICES

HELP = "`lipjax train --help` and docs/config.md list all fields"

_CONFIG = re.compile(r"--?config(?:=(?P<value>.*))?$", re.DOTALL)
_FIELD = re.compile(r"--?(?:no)?config\.(?P<name>[^=]+)(?:=(?P<value>.*))?$", re.DOTALL)


def shipped() -> pathlib.Path:
    """The directory of the configs that come with lipjax: inside the wheel, or beside the package in its repository."""
    package = pathlib.Path(lipjax.__file__).parent
    return next((d for d in (package / "_configs", package.parent / "configs") if d.is_dir()), package / "_configs")


def find(name: str) -> pathlib.Path:
    """The file that --config names: a path, or a name such as "digits" of configs/ here or of those that are shipped.

    A variant behind a colon may follow: "liresnet:cifar10".

    Raises: UserError with the names that are close, if there is none.
    """
    path = pathlib.Path(name.partition(":")[0]).expanduser()
    if path.is_file():
        return path
    stem = path.name.removesuffix(".py")
    # A path to a file that is not here may mean one that is shipped: configs/digits.py, away from the repository.
    if path.parent in (pathlib.Path(), pathlib.Path("configs")):
        for directory in (pathlib.Path("configs"), shipped()):
            if (directory / f"{stem}.py").is_file():
                return directory / f"{stem}.py"
    known = sorted({file.stem for d in (path.parent, pathlib.Path("configs"), shipped()) for file in d.glob("*.py")})
    close = difflib.get_close_matches(stem, known, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"the names are {', '.join(known)}."
    raise UserError(f"--config={name}: there is no such file, and no config of that name; {hint}")


def split_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The last value of --config, None without one, and the other arguments, so that their order does not matter.

    Raises: UserError if --config has no value.
    """
    name, rest, left = None, [], iter(arguments)
    for argument in left:
        if argument == "--":
            return name, [*rest, argument, *left]
        found = _CONFIG.match(argument)
        if found is None:
            rest.append(argument)
            continue
        name = found["value"] if found["value"] is not None else next(left, None)
        if not name or name.startswith("-"):
            raise UserError("--config needs the name or the path of a config, such as --config=digits.")
    return name, rest


def read_config(name: str, arguments: list[str], flag_values: flags.FlagValues | None = None) -> tuple[Any, list[str]]:
    """The locked config of a file with the fields that --config.field=value arguments set, and what is no flag.

    Args: name: as `find` takes it. arguments: without --config and the program. flag_values: other flags that may be
      among them, which get their values; default: none.
    Raises: UserError for a file, field or value that cannot be used.
    """
    path = find(name)
    module = _load(path)
    config = _get_config(path, module, name) if hasattr(module, "get_config") else None
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{path}: a config file must define get_config(), which returns default_config() with changes.")
    settings = _settings(arguments)
    _use_choices(config, dict(settings))
    _check_names(config, [field for field, _ in settings])
    adapt = getattr(module, "adapt", None)
    if adapt is not None:
        first = config.copy_and_resolve_references()
        _override(first, arguments, _copy_of(flag_values))
        with config.unlocked():
            _called(path, adapt, config, first.data)
    rest = _override(config, arguments, flags.FlagValues() if flag_values is None else flag_values)
    return config.lock(), rest


def variants(path: pathlib.Path) -> dict[str, str]:
    """The line that a config file has for each of its variants; {} for a file that is one config."""
    return dict(getattr(_load(path), "VARIANTS", {}))


def default_workdir(name: str) -> str:
    """The directory of a run of --config=NAME if --workdir does not say it: runs/digits, runs/liresnet_cifar10."""
    variant = re.sub(r"[^\w.-]+", "_", name.partition(":")[2])
    return os.path.join("runs", find(name).stem + (f"_{variant}" if variant else ""))


def listed_variants(name: str) -> str | None:
    """The variants of a config file, a line each, where --config=NAME:help asks for them; else None.

    Raises: UserError if the file is no family.
    """
    if name.partition(":")[2] != "help":
        return None
    path = find(name)
    return _list_of_variants(name, variants(path)) or _no_variants(path)


def _list_of_variants(name: str, known: dict[str, str]) -> str:
    given = name.partition(":")[0]
    width = max(map(len, known), default=0) + len(given) + 1
    return "\n".join(f"  {f'{given}:{variant}':<{width}}  {about}" for variant, about in known.items())


def _no_variants(path: pathlib.Path) -> typing.NoReturn:
    raise UserError(f"{path} is one config, without variants: leave out the colon and what follows.")


def _get_config(path: pathlib.Path, module: types.ModuleType, name: str) -> Any:
    """The config of a file, or the variant of it that a name such as liresnet:cifar10 asks for."""
    _, colon, variant = name.partition(":")
    known = getattr(module, "VARIANTS", {})
    if known and variant not in known:
        asked = f"there is no variant {variant!r}" if variant else "a family of configs needs the name of a variant"
        raise UserError(f"--config={name}: {asked}; there are\n{_list_of_variants(name, known)}")
    if not colon:
        return _called(path, module.get_config)
    if not inspect.signature(module.get_config).parameters:
        _no_variants(path)
    return _called(path, module.get_config, variant)


def _load(path: pathlib.Path) -> types.ModuleType:
    module = types.ModuleType("config_file")
    module.__file__ = str(path)
    _called(path, lambda: exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__))
    return module


def _called(path: pathlib.Path, function, *arguments) -> Any:
    try:
        return function(*arguments)
    except UserError:
        raise
    except Exception as error:  # a config file is a program, and may raise anything
        raise UserError(f"{path}: {type(error).__name__}: {error}. {HELP}.") from error


def _copy_of(flag_values: flags.FlagValues | None) -> flags.FlagValues:
    """Flags of the same names, to parse arguments twice."""
    copy = flags.FlagValues()
    for name in flag_values or ():
        boolean = flag_values is not None and flag_values[name].boolean
        define = flags.DEFINE_boolean if boolean else flags.DEFINE_string
        define(name, None, "", flag_values=copy)
    return copy


def _override(config, arguments: list[str], flag_values: flags.FlagValues) -> list[str]:
    argv = ["lipjax", *arguments]
    try:
        config_flags.DEFINE_config_dict("config", config, "The experiment.", flag_values=flag_values, sys_argv=argv)
        return flag_values(argv)[1:]
    except Exception as error:  # absl and ml_collections raise many kinds for values that they cannot read
        raise UserError(str(error)) from error


def _settings(arguments: list[str]) -> list[tuple[str, str | None]]:
    """(field, text) of the arguments that set fields; of the same field twice, the last one counts."""
    found = []
    for position, argument in enumerate(arguments):
        if argument == "--":
            break
        match = _FIELD.match(argument)
        if match:
            following = arguments[position + 1] if position + 1 < len(arguments) else None
            found.append((match["name"], match["value"] if match["value"] is not None else following))
    return found


def _use_choices(config, settings: dict[str, str | None]) -> None:
    """Gives a config the fields of another model, loss, optimizer, schedule or layer that a flag asks for."""
    for choice in CHOICES:
        name = settings.get(choice.path)
        own = choice.chosen(config)
        if name in choice.names and own is not None and name != own:
            choice.choose(config, name)


def _flat(config, prefix: str = "") -> dict[str, bool]:
    """{"group.field": whether it is a group}."""
    found = {}
    for name in config:
        value = config[name]
        group = isinstance(value, ml_collections.ConfigDict)
        found[prefix + name] = group
        if group:
            found |= _flat(value, f"{prefix}{name}.")
    return found


def _check_names(config, names: list[str]) -> None:
    """Raises: UserError for a field that does not exist, with those that may be meant."""
    known = _flat(config)
    for name in names:
        if name not in known:
            raise UserError(f"no such config field: config.{name}. {_suggestion(name, known, config)}")


def _listed(names: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _suggestion(name: str, known: dict[str, bool], config) -> str:
    leaf, fields = name.rpartition(".")[2], [field for field, group in known.items() if not group]
    for choice in CHOICES:
        owners = choice.owners(leaf)
        if name == f"{choice.group}.{leaf}" and owners:
            own = choice.chosen(config) or "without one"
            said = f"The {choice.noun} {_listed(owners)} has it, and this config's is {own}"
            return f"{said}: set --config.{choice.path} too."
    leaves = {field: field.rpartition(".")[2] for field in fields}
    same = [field for field in fields if leaves[field] == leaf]
    initials = [field for field in fields if "".join(word[0] for word in leaves[field].split("_")) == leaf]
    near = difflib.get_close_matches(name, fields, cutoff=0.75)
    alike = difflib.get_close_matches(leaf, sorted(set(leaves.values())), n=2, cutoff=0.75)
    near += [field for field in fields if leaves[field] in alike and field not in near]
    close = (same or (initials if len(leaf) > 1 else []) or near)[:3]
    return f"Did you mean {' or '.join(f'config.{field}' for field in close)}? {HELP}." if close else f"{HELP}."
