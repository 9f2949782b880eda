"""The part of packaging that pyproject.toml cannot state: the wheel carries configs/ as lipjax/_configs.

An editable install needs no copy: lipjax looks for configs/ beside its package, too (lipjax/training/config_file.py).
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lipjax", "lipjax.*"]), "lipjax._configs"],
    package_dir={"lipjax._configs": "configs"},
)
