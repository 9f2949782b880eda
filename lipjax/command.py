"""The command that trains: `python train.py` in the repository, `lipjax train` anywhere."""

import sys
import textwrap

from absl import flags, logging

from lipjax import streams
from lipjax.errors import UserError
from lipjax.run import run
from lipjax.training import cluster, config_file, config_reference
from lipjax.training.compile_alarm import no_slow_compile_alarm

DEFAULT = "digits"
_HELP = ("-h", "-help", "--help", "--helpfull", "--helpshort")


def parse(arguments: list[str], flag_values: flags.FlagValues):
    """The config and the workdir that arguments (without the program) ask for; defines the flags of the command.

    Raises: UserError for whatever is wrong with the flags or with the config file.
    """
    arguments = flags.FLAGS.read_flags_from_files(arguments, force_gnu=False)  # --flagfile=FILE
    name, rest = config_file.split_arguments(arguments)
    name = name or DEFAULT
    flags.DEFINE_string(
        "workdir", config_file.default_workdir(name), "A run that lies there goes on.", flag_values=flag_values
    )
    _define_quiet(flag_values)
    cluster.define_flags(flag_values)
    config, rest = config_file.read_config(name, rest, flag_values)
    if rest:
        raise UserError(f"unexpected arguments {rest}; fields are set as --config.field=value")
    return config, str(flag_values["workdir"].value)


def _define_quiet(flag_values: flags.FlagValues) -> None:
    about = "Print the final table and warnings only. metrics.jsonl holds all numbers."
    flags.DEFINE_boolean("quiet", False, about, short_name="q", flag_values=flag_values)


def print_help(arguments: list[str], program: str) -> None:
    """Usage, flags, and all fields of the config that the arguments name: what they are, and their values there."""
    name, _ = config_file.split_arguments([argument for argument in arguments if argument not in _HELP])
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Default: runs/<config>; a run that lies there goes on.", flag_values=values)
    _define_quiet(values)
    cluster.define_flags(values)
    print(f"Usage: {program} [--config=NAME] [--workdir=DIR] [--config.field=value ...]\n")
    print("Trains, certifies and reports; the same command goes on with a run that was interrupted.\n")
    print("Flags:\n  --config: a path, or a config that is shipped; NAME:help lists variants (default: digits):")
    found = sorted(config_file.shipped().glob("*.py"))
    names = ", ".join(f"{path.stem}:help" if config_file.variants(path) else path.stem for path in found)
    print(textwrap.fill(names, 110, initial_indent=" " * 6, subsequent_indent=" " * 6))
    for flag in ("workdir", *(flag for flag in values if flag not in ("workdir", "q"))):
        default, short = values[flag].default, values[flag].short_name
        name_of = f"--{flag}" if short is None else f"-{short}, --{flag}"
        print(f"  {name_of}: {values[flag].help}{'' if default in (None, False) else f' (default: {default})'}")
    config = None if name is None else config_file.read_config(name, [])[0]
    print(f"\nFields of the config, and their values{' by default' if name is None else f' in {name}'}:")
    print(config_reference.as_text(config))


def main(arguments: list[str], program: str = "lipjax train") -> int:
    """Trains as the arguments (without the program) say. Returns: the exit code."""
    flag_values = flags.FlagValues()
    try:
        with streams.guarded(silent=True):
            if set(arguments) & set(_HELP):
                print_help(arguments, program)
                return 0
            listed = config_file.listed_variants(config_file.split_arguments(arguments)[0] or DEFAULT)
            if listed:
                print(listed)
                return 0
        config, workdir = parse(arguments, flag_values)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    if not flags.FLAGS.is_parsed():
        flags.FLAGS([program])  # libraries read flags of their own there
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    interrupted = "Interrupted. The same command goes on from the last checkpoint."
    with no_slow_compile_alarm():
        return cluster.launch(lambda: run(config, workdir, bool(flag_values["quiet"].value)), interrupted, flag_values)
