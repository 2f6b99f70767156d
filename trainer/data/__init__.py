"""Documents to rows of tokens: `sources` -> `reader` -> `intake` -> `opener` -> `virtual` -> `rows` ->
`stream`.
"""

from trainer.data.cache import cache_path
from trainer.data.chat import ChatSource, chat_template_of
from trainer.data.epochs import steps_left
from trainer.data.files import ArrowSource, JsonlSource, ParquetSource
from trainer.data.holdout import content_hash, is_held_out
from trainer.data.hub import HubSource
from trainer.data.lengths import LengthBias
from trainer.data.megatron import MegatronSource
from trainer.data.reader import DataError, Reader
from trainer.data.rows import IGNORED
from trainer.data.rows import PADDING as PADDING_POSITION
from trainer.data.shards import TokensSource
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
from trainer.data.tokenize import Plan, Tokenizing, finish, plan_of
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
    "MegatronSource",
    "ParquetSource",
    "Plan",
    "PythonSource",
    "Reader",
    "Snapshot",
    "Source",
    "SourcedBatch",
    "StreamConfig",
    "StreamState",
    "SyntheticSource",
    "TextSource",
    "TokenStream",
    "Tokenizing",
    "TokensSource",
    "cache_path",
    "chat_template_of",
    "check_split",
    "content_hash",
    "end_of_text_id",
    "finish",
    "is_held_out",
    "load_tokenizer",
    "permutation",
    "plan_of",
    "ready_tokenizer",
    "roles",
    "steps_left",
    "with_slots",
]
