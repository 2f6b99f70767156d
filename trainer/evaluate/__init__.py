"""What can the model do, while it trains and afterwards? `rows` -> `kernel` -> numbers -> `schedule`."""

from trainer.evaluate.kernel import Measured, measure
from trainer.evaluate.rows import Example, Part, packed
from trainer.evaluate.schedule import Evaluation, Evaluations
from trainer.evaluate.sets import HeldOut, Material, Validation
from trainer.evaluate.start import start_evaluations

__all__ = [
    "Evaluation",
    "Evaluations",
    "Example",
    "HeldOut",
    "Material",
    "Measured",
    "Part",
    "Validation",
    "measure",
    "packed",
    "start_evaluations",
]
