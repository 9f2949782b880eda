"""Trains, certifies and reports.

Run: python train.py --config=configs/X.py --workdir=DIR --config.optimizer.learning_rate=0.01
"""

import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: see lipjax/__init__.py

try:
    import lipjax.training  # noqa: F401  first, because it says which packages are missing
    from lipjax.command import main
except ModuleNotFoundError as error:
    sys.exit(f"Error: {error}")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python train.py"))
