"""Documents to rows of tokens: `sources` -> `reader` -> `intake` -> `opener` -> `virtual` -> `rows` ->
`stream`.
"""

from trainer.data.chat import ChatSource, chat_template_of
from trainer.data.epochs import steps_left
from trainer.data.files import ArrowSource, JsonlSource, ParquetSource
from trainer.data.holdout import content_hash, is_held_out
from trainer.data.hub import HubSource
from trainer.data.lengths import LengthBias
from trainer.data.reader import DataError
from trainer.data.rows import IGNORED
from trainer.data.rows import PADDING as PADDING_POSITION
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
from trainer.data.tokenizer import end_of_text_id, load_tokenizer, ready_tokenizer, roles

__all__ = [
    "BAD_KINDS",
    "COUNTED",
    "IGNORED",
    "PADDING_POSITION",
    "ArrowSource",
    "BadDocument",
    "Batch",
    "ChatSource",
    "DataError",
    "Document",
    "HubSource",
    "JsonlSource",
    "LengthBias",
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
    "chat_template_of",
    "check_split",
    "content_hash",
    "end_of_text_id",
    "is_held_out",
    "load_tokenizer",
    "permutation",
    "ready_tokenizer",
    "roles",
    "steps_left",
    "with_slots",
]
