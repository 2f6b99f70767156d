"""Triquetra: mixture-of-experts pretraining with HSDP x EP, from a laptop CPU to a GPU cluster.

The names of `__all__` are the library (docs/library.md). `import trainer` imports nothing else: each name is
fetched from its module when it is first asked for.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from trainer.version import __version__

# Read by torch when it first asks a GPU for memory: with fixed segments, rows that differ from microbatch to
# microbatch, as an expert's do, leave gaps that nothing fits into. Whoever has set it has their own reason.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

if TYPE_CHECKING:
    from trainer.balance import RoutingStats, centered
    from trainer.config import Config, ConfigError, load
    from trainer.data import BadDocument, Document, Source
    from trainer.metrics import Tracker
    from trainer.run.recover import leave_unread
    from trainer.run.saving import finish_saving, save
    from trainer.run.state import Run
    from trainer.run.step import next_batches, train_step
    from trainer.train import conclude, due, start

__all__ = [
    "BadDocument",
    "Config",
    "ConfigError",
    "Document",
    "RoutingStats",
    "Run",
    "Source",
    "Tracker",
    "__version__",
    "centered",
    "conclude",
    "due",
    "finish_saving",
    "leave_unread",
    "load",
    "next_batches",
    "save",
    "start",
    "train_step",
]
_HOMES = {
    "trainer.balance": ("RoutingStats", "centered"),
    "trainer.config": ("Config", "ConfigError", "load"),
    "trainer.data": ("BadDocument", "Document", "Source"),
    "trainer.metrics": ("Tracker",),
    "trainer.run.recover": ("leave_unread",),
    "trainer.run.saving": ("finish_saving", "save"),
    "trainer.run.state": ("Run",),
    "trainer.run.step": ("next_batches", "train_step"),
    "trainer.train": ("conclude", "due", "start"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
