"""Trains, certifies and reports: python train.py --config=configs/X.py --workdir=DIR --config.optimizer.learning_rate=0.01"""

import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: see lipjax/__init__.py

from absl import app, flags
from ml_collections import config_flags

from lipjax.errors import NotCertifiable, UserError
from lipjax.training.run import run

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
    "config", os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", "digits.py"), "The experiment."
)
flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and reports go; default runs/<config>. A run there resumes.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"Unexpected arguments {argv[1:]}: fields are set as --config.field=value.")
    name = os.path.splitext(os.path.basename(config_flags.get_config_filename(FLAGS["config"])))[0]
    run(FLAGS.config, FLAGS.workdir or os.path.join("runs", name))
    return 0


def main_with_clear_errors(argv: list[str]) -> int:
    try:
        return main(argv)
    except (UserError, NotCertifiable) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    app.run(main_with_clear_errors)
