"""What does a resumed run need, is it what was written, and where does it lie?"""

from trainer.checkpoint.boxes import BoxReader, TensorSpec, read_header, write_file
from trainer.checkpoint.checkpoints import Checkpoints, Found, SaveError
from trainer.checkpoint.foreign import DamagedError, json_of, naturals, plain_name, read_json, reading
from trainer.checkpoint.manifest import MANIFEST, manifest_hash, problems, read_manifest
from trainer.checkpoint.storage import (
    StoredTensor,
    TensorPiece,
    make_durable,
    read_index,
    refuse_uncovered,
    write_durably,
)
from trainer.checkpoint.transfer import load_into, read_whole

__all__ = [
    "MANIFEST",
    "BoxReader",
    "Checkpoints",
    "DamagedError",
    "Found",
    "SaveError",
    "StoredTensor",
    "TensorPiece",
    "TensorSpec",
    "json_of",
    "load_into",
    "make_durable",
    "manifest_hash",
    "naturals",
    "plain_name",
    "problems",
    "read_header",
    "read_index",
    "read_json",
    "read_manifest",
    "read_whole",
    "reading",
    "refuse_uncovered",
    "write_durably",
    "write_file",
]
