"""What can the model do, while it trains and afterwards? `rows` -> `kernel` -> numbers -> `schedule`."""

from trainer.evaluate.answers import Answers
from trainer.evaluate.kernel import Measured, measure
from trainer.evaluate.needle_source import NeedleSource
from trainer.evaluate.needles import Needles
from trainer.evaluate.rows import Example, Part, packed
from trainer.evaluate.schedule import Evaluation, Evaluations
from trainer.evaluate.sets import HeldOut, Material, Validation
from trainer.evaluate.start import start_evaluations
from trainer.evaluate.tasks import Task

__all__ = [
    "Answers",
    "Evaluation",
    "Evaluations",
    "Example",
    "HeldOut",
    "Material",
    "Measured",
    "NeedleSource",
    "Needles",
    "Part",
    "Task",
    "Validation",
    "measure",
    "packed",
    "start_evaluations",
]
