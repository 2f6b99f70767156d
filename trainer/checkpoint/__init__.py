"""What does a resumed run need, is it what was written, and where does it lie?"""

from trainer.checkpoint.checkpoints import Checkpoints, Found, SaveError
from trainer.checkpoint.manifest import code_version, problems, read_manifest
from trainer.checkpoint.state import set_training_state, training_state
from trainer.checkpoint.storage import DamagedError, Piece, Stored, read_index
from trainer.checkpoint.transfer import load_into, read_whole

__all__ = [
    "Checkpoints", "DamagedError", "Found", "Piece", "SaveError", "Stored", "code_version", "load_into", "problems", "read_index",
    "read_manifest", "read_whole", "set_training_state", "training_state",
]  # fmt: skip
