"""Certified networks to take home: each with its certificate, its report and a model card. docs/zoo.md."""

from lipjax.zoo.adding import add
from lipjax.zoo.fetching import fetch
from lipjax.zoo.library import card, directory, images, load, located
from lipjax.zoo.library import names as list

__all__ = ["add", "card", "directory", "fetch", "images", "list", "load", "located"]


def __dir__():
    return __all__
