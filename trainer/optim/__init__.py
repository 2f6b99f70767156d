"""Which parameter gets which optimizer, and how do many ranks share the orthogonalisation of a matrix?

An optimizer factory is a function of the model (`configs/optim/*.yaml` names it by `_target_`) that returns
one or several torch optimizers. Rates are peak rates: the program (trainer/program.py) scales all of them by
one factor.
"""

from trainer.optim.groups import Optimizers, adamw, muon
from trainer.optim.momentum import Muon

__all__ = ["Muon", "Optimizers", "adamw", "muon"]
