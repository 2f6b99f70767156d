"""How is a run held at a step until something has been done to it? By its source of documents.

Nothing is decided by time: rank 0, which has written down all steps before, stands before a document until
Slurm has begun its job again or until it was told to stop; the others wait for it. data.source._target_ names
it, as it names a user's own source.
"""

import os
import time
from pathlib import Path
from typing import Any

from trainer.data import Document, SyntheticSource
from trainer.ranks.stop import StopRequest

GATE = "TRIQUETRA_GATE"  # a directory; without it nothing is held


class Gated(SyntheticSource):
    """hold_at: the document that the first life waits for."""

    def __init__(self, *, hold_at: int, **synthetic: Any) -> None:
        super().__init__(**synthetic)
        self.hold_at = hold_at
        name = f"held.{os.environ.get('SLURM_ARRAY_TASK_ID', 'run')}"
        self.held = Path(os.environ[GATE]) / name if GATE in os.environ else None
        self.is_first_life = self.held is not None and not self.held.exists()
        if self.held is not None and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            self.again.touch()

    @property
    def again(self) -> Path:
        return self.held.with_name(f"again.{self.held.name}")

    def __getitem__(self, i: int) -> Document:
        if i >= self.hold_at and self.is_first_life and os.environ["RANK"] == "0":
            self.held.touch()
            while not (self.again.exists() or (StopRequest.current and StopRequest.current.signalled)):
                time.sleep(0.02)
        return super().__getitem__(i)
