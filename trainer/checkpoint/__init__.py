"""What does a resumed run need, is it what was written, and where does it lie?"""

from trainer.checkpoint.boxes import BoxReader, Kind, read_header, write_file
from trainer.checkpoint.checkpoints import Checkpoints, Found, SaveError
from trainer.checkpoint.manifest import code_version, manifest_hash, problems, read_manifest
from trainer.checkpoint.storage import DamagedError, Piece, Stored, make_durable, read_index, write_durably
from trainer.checkpoint.transfer import load_into, read_whole

__all__ = [
    "BoxReader",
    "Checkpoints",
    "DamagedError",
    "Found",
    "Kind",
    "Piece",
    "SaveError",
    "Stored",
    "code_version",
    "load_into",
    "make_durable",
    "manifest_hash",
    "problems",
    "read_header",
    "read_index",
    "read_manifest",
    "read_whole",
    "write_durably",
    "write_file",
]
