"""Documents to rows of tokens: `sources` -> `reader` -> `intake` -> `opener` -> `virtual` -> `rows` ->
`stream`.
"""

from trainer.data.files import ArrowSource, JsonlSource, ParquetSource
from trainer.data.hub import HubSource
from trainer.data.reader import DataError
from trainer.data.sources import (
    BAD_KINDS,
    BadDocument,
    Document,
    PythonSource,
    Source,
    SyntheticSource,
    TextSource,
    permutation,
)
from trainer.data.state import Snapshot, StreamState, with_slots
from trainer.data.stream import COUNTED, Batch, SourcedBatch, StreamConfig, TokenStream, check_split
from trainer.data.tokenizer import end_of_text_id, load_tokenizer, roles

__all__ = [
    "BAD_KINDS",
    "COUNTED",
    "ArrowSource",
    "BadDocument",
    "Batch",
    "DataError",
    "Document",
    "HubSource",
    "JsonlSource",
    "ParquetSource",
    "PythonSource",
    "Snapshot",
    "Source",
    "SourcedBatch",
    "StreamConfig",
    "StreamState",
    "SyntheticSource",
    "TextSource",
    "TokenStream",
    "check_split",
    "end_of_text_id",
    "load_tokenizer",
    "permutation",
    "roles",
    "with_slots",
]
