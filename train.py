"""Trains, certifies and reports.

Run: python train.py --config=configs/X.py --workdir=DIR --config.optimizer.learning_rate=0.01
"""

import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: see lipjax/__init__.py

from lipjax.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python train.py"))
