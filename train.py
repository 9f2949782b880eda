"""Trains, certifies and reports.

Run: python train.py --config=configs/X.py --workdir=DIR --config.optimizer.learning_rate=0.01
"""

import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: see lipjax/__init__.py

from absl import app, flags, logging
from ml_collections import config_flags

from lipjax.errors import UserError
from lipjax.training import cluster
from lipjax.training.run import run

FLAGS = flags.FLAGS
DEFAULT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", "digits.py")


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; whatever is wrong with them or with the config file ends as one message and exit code 2."""
    try:
        config_flags.DEFINE_config_file("config", DEFAULT, "The experiment: a file.", flag_values=FLAGS)
        flags.DEFINE_string("workdir", None, "Default: runs/<config>; a run there resumes.", flag_values=FLAGS)
        cluster.define_flags(FLAGS)
        rest = FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"unexpected arguments {rest[1:]}; fields are set as --config.field=value")
        FLAGS.config.to_dict()  # raises if the file could not be loaded
        return rest
    except (AttributeError, KeyError) as error:
        text: object = error
        while isinstance(text, Exception) and text.args:
            text = text.args[0]  # ml_collections wraps one error in the other
        what = "a config file must define get_config()" if "get_config" in str(text) else "no such config field"
        print(f"Error: {what}: {text}. lipjax/training/config.py lists all fields.", file=sys.stderr)
    except (flags.Error, UserError) as error:
        print(f"Error: {error}", file=sys.stderr)
    except Exception as error:  # a config file is a program, and may raise anything
        print(f"Error: {type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str]) -> int:
    del argv
    logging.set_verbosity(logging.WARNING)
    name = os.path.splitext(os.path.basename(config_flags.get_config_filename(FLAGS["config"])))[0]
    workdir = FLAGS.workdir or os.path.join("runs", name)
    interrupted = "Interrupted. The same command goes on from the last checkpoint."
    return cluster.launch(lambda: run(FLAGS.config, workdir), interrupted, FLAGS)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
