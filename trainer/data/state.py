"""What must be remembered for a stream to continue?

The position of each virtual stream: which documents come next, which are open and how far they were read. A
Snapshot holds positions as plain lists, so taking one costs microseconds. The tensors are made when they are
saved.

Letters: V virtual streams, S sources, C slots of open documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from trainer.data.buffer import EMPTY

BEYOND = -2  # in the tensors: what is behind a stream's last slot
StreamState = dict[str, torch.Tensor]


class Position(NamedTuple):
    """Where one virtual stream stands."""

    next_S: list[int]  # the document that is opened next
    credit_S: list[float]  # [tokens]
    draws_S: list[int]
    phase: int
    numbers_SC: list[list[int]]  # of open documents in their source, or EMPTY; oldest first
    read_SC: list[list[int]]  # [tokens] delivered of them; of an empty slot it says nothing

    @property
    def num_slots(self) -> int:
        return sum(map(len, self.numbers_SC))


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The streams of one rank between two steps. `counts`: in the order of stream.COUNTED."""

    positions_V: list[Position]
    counts: list[int]
    num_streams: int  # of all ranks

    def state_dict(self) -> StreamState:
        """This rank's part. The state of the run has the streams of all ranks in their order, with equal
        slots (`with_slots`), and the sum of the counts. 9 bytes for each open document.

        index_VC: of a document in its stream's share of its source; EMPTY: an empty slot, BEYOND: none.
        """
        positions_V = self.positions_V
        num_slots = max(1, *(position.num_slots for position in positions_V))
        shape = (len(positions_V), num_slots)
        index_VC, read_VC = np.full(shape, BEYOND, np.int64), np.zeros(shape, np.int64)
        source_VC = np.zeros(shape, np.int64)
        for v, position in enumerate(positions_V):
            filled = slice(position.num_slots)
            index_VC[v, filled] = chained(position.numbers_SC) // self.num_streams  # EMPTY, -1, stays
            read_VC[v, filled] = chained(position.read_SC) * (index_VC[v, filled] != EMPTY)
            source_VC[v, filled] = np.repeat(
                np.arange(len(position.next_S)), list(map(len, position.numbers_SC))
            )
        return {
            "next_VS": torch.tensor([position.next_S for position in positions_V]),
            "credit_VS": torch.tensor([position.credit_S for position in positions_V], dtype=torch.float64),
            "draws_VS": torch.tensor([position.draws_S for position in positions_V]),
            "phase_V": torch.tensor([position.phase for position in positions_V]),
            "index_VC": torch.from_numpy(narrowed(index_VC, np.int32)),
            "read_VC": torch.from_numpy(narrowed(read_VC, np.int32)),
            "source_VC": torch.from_numpy(narrowed(source_VC, np.uint8)),
            "counts": torch.tensor(self.counts),
        }


def chained(values_SC: list[list[int]]) -> np.ndarray:
    return np.array(list(chain.from_iterable(values_SC)), np.int64)


def positions(state: StreamState, *, streams: Sequence[int], num_streams: int) -> list[Position]:
    """The inverse of `state_dict`, of the streams of one rank."""
    heads_VC3 = np.stack([state[name].numpy() for name in ("index_VC", "read_VC", "source_VC")], axis=2)
    names = ("next_VS", "credit_VS", "draws_VS", "phase_V")
    values_V = zip(*(state[name].tolist() for name in names), strict=True)
    result = list[Position]()
    for number, (next_S, credit_S, draws_S, phase), heads_C3 in zip(
        streams, values_V, heads_VC3, strict=True
    ):
        numbers_SC, read_SC = [list[int]() for _ in next_S], [list[int]() for _ in next_S]
        for index, read, source in heads_C3.tolist():
            if index != BEYOND:
                numbers_SC[source].append(number + index * num_streams if index != EMPTY else EMPTY)
                read_SC[source].append(read)
        result.append(Position(next_S, credit_S, draws_S, phase, numbers_SC, read_SC))
    return result


def refuse_foreign(
    state: StreamState, *, streams: range, num_streams: int, num_ranks: int, num_sources: int
) -> None:
    """Raises: ValueError if the state is not that of these streams of this run."""
    num_rows, num_columns = state["next_VS"].shape
    if num_rows != len(streams):
        before = num_rows * num_ranks
        message = f"the checkpoint has {before} streams, this run {num_streams}"
        raise ValueError(f"{message}; use data.num_streams={before}")
    if num_columns != num_sources:
        message = f"the checkpoint has {num_columns} sources, this run {num_sources}"
        raise ValueError(f"{message}; set data.sources back")
    number_V1 = torch.arange(streams.start, streams.stop)[:, None]
    next_VS, index_VC, source_VC = state["next_VS"], state["index_VC"].long(), state["source_VC"].long()
    are_sources = (source_VC < num_sources).all()
    are_own = (next_VS % num_streams == number_V1).all() and (next_VS >= 0).all()
    are_counts = (state["read_VC"] >= 0).all() and (state["draws_VS"] >= 0).all()
    fits = are_sources and are_own and are_counts and (index_VC >= BEYOND).all()
    # open documents lie before the next one
    if not fits or not (number_V1 + index_VC * num_streams < next_VS.gather(1, source_VC)).all():
        raise ValueError(
            f"the state is not that of streams {streams.start} to {streams.stop - 1} of this run"
        )


def with_slots(state: StreamState, *, num_slots: int) -> StreamState:
    """A rank's state with room for so many open documents, as they must be equal on all ranks."""
    missing = num_slots - state["index_VC"].shape[1]
    fill = {"index_VC": BEYOND, "read_VC": 0, "source_VC": 0}
    wide = {
        name: torch.nn.functional.pad(state[name], (0, missing), value=value) for name, value in fill.items()
    }
    return {**state, **wide}


def narrowed(values: np.ndarray, dtype: type) -> np.ndarray:
    if values.max() > np.iinfo(dtype).max:
        raise OverflowError(f"{values.max()} does not fit the state's {np.dtype(dtype).name}")
    return values.astype(dtype)
