"""Corpora in which a token says where it comes from, and streams over them, on any number of ranks."""

from pathlib import Path

import numpy as np
import torch

from trainer import data
from trainer.data import Document, StreamConfig, TokenStream, with_slots


class ListSource:
    """Token documents from a list."""

    fingerprint = "list"

    def __init__(self, documents: list[list[int]]) -> None:
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, i: int) -> Document:
        return Document(f"list:{i}", tokens=np.array(self.documents[i]))


class TextListSource(ListSource):
    """Texts from a list."""

    def __getitem__(self, i: int) -> Document:
        return Document(f"list:{i}", text=self.documents[i])


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents in which no token occurs twice, so that a token says where it comes from."""
    ends = np.cumsum(lengths)
    return [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]


# Empty, of one token, just a row (L = 16), one token around it, many rows, and ragged ones in between.
LENGTHS = [5, 0, 1, 16, 15, 17, 32, 300, 1, 1, 0, 7, 48, 3, 11, 2, 64, 9, 23, 130, 1, 6, 16, 41]


def make_stream(
    source: object, *, tokenizer=None, rank: int = 0, num_ranks: int = 1, report=None, **changes: object
) -> TokenStream:
    """`changes`: of the StreamConfig."""
    config = {"seq_len": 16, "global_batch": 16, "num_streams": 8, "seed": 3, **changes}
    return TokenStream(
        StreamConfig(**config),
        source=source,
        tokenizer=tokenizer,
        rank=rank,
        num_ranks=num_ranks,
        report=report or (lambda bad: None),
    )


def step_rows(stream: TokenStream, micro_batch: int = 1) -> torch.Tensor:
    """tokens, labels, positions of a rank's rows of one step: (3, rows, L)."""
    return torch.cat([torch.stack(list(batch)) for batch in stream.next_step(micro_batch)], dim=1)


def global_rows(streams: list[TokenStream]) -> torch.Tensor:
    return torch.cat([step_rows(stream) for stream in streams], dim=1)


def ranks(num_ranks: int, source: object, **changes: object) -> list[TokenStream]:
    return [make_stream(source, rank=rank, num_ranks=num_ranks, **changes) for rank in range(num_ranks)]


def gathered(streams: list[TokenStream]) -> dict[str, torch.Tensor]:
    """The state of the run: the streams of all ranks, and the sum of what they counted."""
    states = [stream.state_dict() for stream in streams]
    num_slots = max(state["index_VC"].shape[1] for state in states)
    states = [with_slots(state, num_slots=num_slots) for state in states]
    parts = {name: [state[name] for state in states] for name in states[0]}
    return {name: sum(each) if name == "counts" else torch.cat(each) for name, each in parts.items()}


def load(streams: list[TokenStream], state: dict[str, torch.Tensor]) -> list[TokenStream]:
    for stream in streams:
        own = slice(stream.streams.start, stream.streams.stop)
        part = {name: tensor if name == "counts" else tensor[own] for name, tensor in state.items()}
        stream.load_state_dict(part, keep_counts=stream.streams.start == 0)
    return streams


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def write_lines(path: Path, lines: list[bytes]) -> str:
    path.write_bytes(b"\n".join(lines))
    return str(path)


class ArraySource(ListSource):
    """Token documents from a list of arrays."""

    def __getitem__(self, i: int) -> data.Document:
        return data.Document(f"array:{i}", tokens=self.documents[i])


def arrays(lengths: list[int], *, first: int = 0) -> ArraySource:
    """Documents of tokens first, first + 1, ...: a token says where it comes from."""
    return ArraySource(np.split(np.arange(first, first + sum(lengths)), np.cumsum(lengths)[:-1]))


def settings(stream: TokenStream, **changes: object) -> None:
    """What next_batches does when the program goes on."""
    batch = stream.now.rows_per_stream * stream.num_streams
    now = {"seq_len": stream.now.seq_len, "global_batch": batch, "mixture": None, "buffer": 0}
    stream.set(**{**now, **changes})


def open_documents(stream: TokenStream) -> list[tuple[int, int, int]]:
    """(source, document, tokens read) from the state, which is all that a resumed run knows."""
    state = stream.state_dict()
    rows, slots = np.nonzero(state["index_VC"].numpy() >= 0)
    index, read, source = (state[name].numpy()[rows, slots] for name in ("index_VC", "read_VC", "source_VC"))
    number = rows + stream.streams.start + index.astype(int) * stream.num_streams
    return list(zip(source.tolist(), number.tolist(), read.tolist(), strict=True))


def place(source: ArraySource, n: int, seed: int) -> int:
    epoch, position = divmod(n, len(source))
    return int(data.permutation(len(source), seed=seed, epoch=epoch)[position])


PHASES = [
    ({"a": 1.0, "b": 2.0}, 0),
    ({"a": 1.0, "b": 2.0}, 3),
    ({"a": 5.0, "c": 1.0}, 8),
    ({"b": 1.0, "c": 1.0}, 2),
    ({"b": 1.0, "c": 1.0}, 0),
    ({"a": 1.0, "b": 1.0, "c": 1.0}, 5),
]


def ragged_sources() -> dict[str, ListSource]:
    documents = {name: numbered(LENGTHS[i:] + LENGTHS[:i]) for i, name in enumerate("abc")}
    return {
        name: ListSource([[token + 1000 * i for token in d] for d in documents[name]])
        for i, name in enumerate("abc")
    }
