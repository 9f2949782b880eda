"""What pyproject.toml cannot say: the wheel carries configs/ as lipjax/_configs, beside all packages that are found.

An editable install needs no copy: lipjax looks for configs/ beside its package, too (lipjax/training/config_file.py).
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lipjax", "lipjax.*"]), "lipjax._configs"],
    package_dir={"lipjax._configs": "configs"},
)
