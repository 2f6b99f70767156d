"""Which conversations are there, and what makes one unusable?

A record of JSON lines, Parquet or a dataset of the hub has `messages` as `transformers` has them (role,
content; reasoning_content, tool_calls), and perhaps `tools` and `chat_template_kwargs`; or it has `prompt`
and `completion`, texts or lists of messages.
"""

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from trainer.data.conversation import (
    RESERVED,
    TEMPLATE,
    Conversations,
    TemplateRefusal,
    own_template,
    strings,
)
from trainer.data.files import JSONL, Damage, JsonlSource, ParquetSource, decoding
from trainer.data.sources import BadDocument, Document, find_files, hashed

DIALOGUES = Path(__file__).parent / "dialogues.jsonl"  # about this project
FIELDS = ("messages", "prompt", "completion", "tools", "chat_template_kwargs")
FIRST = ("system", "developer", "user")
# Who may speak after whom.
NEXT = {
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


class Records(Protocol):
    """Rows with random access."""

    fingerprint: str

    def __len__(self) -> int: ...

    def record(self, i: int) -> tuple[str, Any]:
        """Where row i is, and what it holds. Raises: BadDocument, OSError."""
        ...


class ChatSource:
    """One conversation, one document of tokens; what its labels are, a mask says.

    path: a file, a directory, a glob or a *.manifest of JSON lines or Parquet. name: in its place a dataset
    of the hub or a local one, with split= and subset=. Neither: the dialogues that ship. labels: see
    Conversations. template: a file with a chat template; null: that of data.tokenizer, or else ours.
    """

    masks = needs_labels = True

    def __init__(
        self,
        path: str | None = None,
        name: str | None = None,
        split: str = "train",
        subset: str | None = None,
        labels: str = "assistant",
        template: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        if path is not None and name is not None:
            raise ValueError(f"path={path} and name={name} are both set; set one of them to null")
        self.labels, self.template = labels, template_file(template)
        self.records: Records = (
            HubRecords(name, split=split, subset=subset)
            if name is not None
            else records_of(str(DIALOGUES) if path is None else path, cache_dir=cache_dir)
        )
        self.conversations: Conversations | None = None
        self.fingerprint = hashed(self.records.fingerprint, labels)

    def bind(self, tokenizer: Tokenizer | None, spec: str | None) -> None:
        """Takes the tokenizer that `spec`, data.tokenizer, has named. Raises: ValueError."""
        if tokenizer is None:
            raise ValueError(f"data.tokenizer={spec}: a conversation is text; {self.remedy}")
        own, names = own_template(spec)
        template = self.template or own or TEMPLATE.read_text("utf-8")
        self.conversations = Conversations(tokenizer, template, labels=self.labels, names=names)
        self.fingerprint = hashed(self.records.fingerprint, self.labels, template)

    remedy = "name the tokenizer of the weights that the run starts from, like data.tokenizer=runs/demo"

    @property
    def bound(self) -> Conversations:
        """Raises: ValueError."""
        if self.conversations is None:
            raise ValueError(
                f"data.tokenizer=train: a tokenizer is not trained on conversations; {self.remedy}"
            )
        return self.conversations

    @property
    def chat_template(self) -> str | None:
        """What a conversation was rendered by."""
        return self.conversations.template if self.conversations is not None else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Document:
        bound = self.bound
        where, record = self.records.record(i)
        if not isinstance(record, dict):
            raise BadDocument("missing_field", where, "no object with messages")
        messages = messages_of(record, where=where)
        tools = parsed(record, "tools", list, where=where)
        variables = parsed(record, "chat_template_kwargs", dict, where=where) or {}
        refuse_unspeakable([messages, tools, variables], where=where)
        check_turns(messages, where=where)
        try:
            ids, mask = bound(messages, tools=tools, variables=variables)
        except TemplateRefusal as error:
            raise BadDocument("turns", where, f"the chat template refuses it: {error}") from None
        if mask is not None and not mask[1:].any():
            raise BadDocument("no_label", where, "the chat template marks nothing that the assistant says")
        return Document(where, tokens=ids, mask=mask)


def chat_template_of(sources: Iterable[Any]) -> str | None:
    """By which conversations are rendered: that of the first source of them."""
    return next(filter(None, (getattr(source, "chat_template", None) for source in sources)), None)


def template_file(path: str | None) -> str | None:
    try:
        return None if path is None else Path(path).expanduser().read_text("utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"template={path}: cannot be read ({error}); give a file, or null") from error


# -- records ------------------------------------------------------------------------------------------------


def records_of(path: str, *, cache_dir: str | None) -> Records:
    """Of files of one kind. Raises: ValueError."""
    are_parquet = {file.suffix == ".parquet" for file in find_files(path, suffixes=(".parquet", *JSONL))}
    if len(are_parquet) == 2:
        raise ValueError(
            f"{path}: there are Parquet and JSON lines; give one kind, like path='{path}/*.jsonl'"
        )
    return ParquetRecords(path) if are_parquet == {True} else JsonlSource(path, cache_dir=cache_dir)


class ParquetRecords(ParquetSource):
    """Rows of the columns that a conversation may have."""

    def __init__(self, path: str) -> None:
        self.field = "messages"
        files = find_files(path, suffixes=(self.suffix,))
        names, _ = self.opened(files[0])
        super().__init__(path, field=next((name for name in FIELDS[:2] if name in names), FIELDS[0]))
        self.columns = [name for name in FIELDS if name in names]
        self.column = lru_cache(maxsize=8)(self.read_columns)

    def read_columns(self, part: int) -> Any:
        from pyarrow.parquet import ParquetFile

        path, group, _ = self.places[part]
        try:
            with decoding(), ParquetFile(path, page_checksum_verification=True) as file:
                return file.read_row_group(group, columns=self.columns, use_threads=False)
        except Damage as damage:
            return str(damage)

    def value(self, part: int, row: int) -> object:
        table = self.column(part)
        if isinstance(table, str):
            raise Damage(table)
        return whole({name: table.column(name)[row].as_py() for name in table.column_names})


class HubRecords:
    """A dataset of the hub, fetched whole: an epoch has an order of its own."""

    def __init__(self, name: str, *, split: str, subset: str | None) -> None:
        import datasets

        try:
            self.dataset = datasets.load_dataset(name, subset, split=split)
        except Exception as error:  # a dozen kinds: no network, no such name, subset or split
            remedy = "check name=, subset= and split=, the network and HF_HUB_OFFLINE"
            raise ValueError(f"{name}: cannot open the dataset ({error}); {remedy}") from error
        columns = self.dataset.column_names
        if not {"messages", "prompt"} & set(columns):
            raise ValueError(f"{name}: has neither messages nor prompt and completion, but {columns}")
        self.dataset = self.dataset.select_columns([field for field in FIELDS if field in columns])
        self.name, self.fingerprint = name, hashed(name, split, subset, len(self.dataset))

    def __len__(self) -> int:
        return len(self.dataset)

    def record(self, i: int) -> tuple[str, Any]:
        return f"{self.name}:{i + 1}", whole(self.dataset[i])


def whole(value: Any) -> Any:
    """Without what is null: a column has every key of every row."""
    if isinstance(value, dict):
        return {key: whole(one) for key, one in value.items() if one is not None}
    return [whole(one) for one in value] if isinstance(value, list) else value


# -- one conversation ---------------------------------------------------------------------------------------


def messages_of(record: Mapping[str, Any], *, where: str) -> list[dict[str, Any]]:
    """Raises: BadDocument."""
    if record.get("messages") is not None:
        messages = record["messages"]
    elif record.get("prompt") is not None and record.get("completion") is not None:
        messages = [*turn(record["prompt"], "user"), *turn(record["completion"], "assistant")]
    else:
        raise BadDocument("missing_field", where, "neither messages nor prompt and completion")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadDocument("missing_field", where, "messages is no list of objects with role and content")
    # as apply_chat_template does: templates know a missing key, and write None as a word
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def turn(content: Any, role: str) -> list[Any]:
    return content if isinstance(content, list) else [{"role": role, "content": content}]


def refuse_unspeakable(parts: Any, *, where: str) -> None:
    """Raises: BadDocument."""
    for text in strings(parts):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
            raise BadDocument("not_utf8", where, str(error)) from None
        if match := RESERVED.search(text):
            raise BadDocument(
                "not_utf8", where, f"U+{ord(match[0]):04X} is a noncharacter, which no text holds"
            )


def check_turns(messages: list[dict[str, Any]], *, where: str) -> None:
    """Raises: BadDocument."""
    allowed: tuple[str, ...] = FIRST
    for number, message in enumerate(messages, start=1):
        role = message.get("role")
        if role not in NEXT:
            raise BadDocument("turns", where, f"message {number}: role={role!r} is none of {', '.join(NEXT)}")
        if role not in allowed:
            raise BadDocument(
                "turns", where, f"message {number}: {role} where {' or '.join(allowed)} may speak"
            )
        content = message.get("content", "")
        if not isinstance(content, str | list):
            raise BadDocument("missing_field", where, f"message {number}: content is no text and no list")
        allowed = NEXT[role]
    if not any(message["role"] == "assistant" for message in messages):
        raise BadDocument("no_label", where, "the assistant says nothing")


def parsed(record: Mapping[str, Any], field: str, kind: type, *, where: str) -> Any:
    """A value, or the JSON of one: columns of files hold texts more easily. Raises: BadDocument."""
    value = record.get(field)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadDocument("broken_json", where, f"{field}: {error}") from None
    if value is not None and not isinstance(value, kind):
        raise BadDocument("missing_field", where, f"{field} is {type(value).__name__}, not {kind.__name__}")
    return value or None
