"""Attacks: upper bounds of the robust accuracy, and attempts to break certificates and Lipschitz bounds."""

from lipjax.attacks.lipschitz_search import LipschitzSearch, lipschitz_lower_bound
from lipjax.attacks.pgd import OBJECTIVES, TARGETED, apgd_l2, pgd_l2, project_l2
from lipjax.attacks.search import METHODS, AttackResult, attack_l2, attack_within, evaluate_points, lengths
from lipjax.attacks.square import square_l2

__all__ = [
    "METHODS",
    "OBJECTIVES",
    "TARGETED",
    "AttackResult",
    "LipschitzSearch",
    "apgd_l2",
    "attack_l2",
    "attack_within",
    "evaluate_points",
    "lengths",
    "lipschitz_lower_bound",
    "pgd_l2",
    "project_l2",
    "square_l2",
]


def __dir__() -> list[str]:
    return __all__
