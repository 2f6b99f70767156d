"""What are the rows of an evaluation? Whole documents side by side, cut at the length of a row, then padding.

Rows are made once, at the start, on one rank and in a fixed order: they depend on neither ranks nor micro
batch. A group is whatever is to be told apart in the sums: a stretch of positions, an answer of a question.

Letters: R rows, L tokens of a row, T tokens of a document, G groups.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.data import IGNORED, PADDING_POSITION


class Example(NamedTuple):
    """One document or question. Its last token is a label only; int64."""

    tokens_T: Tensor
    groups_T: Tensor  # of each token as a label; below 0: it is no label


@dataclass(kw_only=True)
class Part:
    """Rows that are summed up together: a set, or one source of it. Planes have the shape (R, L)."""

    name: str
    tokens_RL: Tensor
    labels_RL: Tensor
    positions_RL: Tensor
    groups_RL: Tensor
    num_groups: int
    about: dict[str, Any] = field(default_factory=dict)  # what the evaluation needs to read the sums

    @property
    def planes(self) -> tuple[Tensor, ...]:
        return self.tokens_RL, self.labels_RL, self.positions_RL, self.groups_RL


def packed(
    examples: Iterable[Example], *, name: str, seq_len: int, num_groups: int, about: dict[str, Any]
) -> Part:
    """Each example goes into the fullest row that has room for it; one longer than a row is cut."""
    rows, room = list[list[Example]](), list[int]()
    for example in examples:
        cut = Example(*(plane[: seq_len + 1] for plane in example))
        length = len(cut.tokens_T) - 1
        if length < 1:  # one token predicts nothing
            continue
        with_room = [r for r, left in enumerate(room) if left >= length]
        if not with_room:
            rows.append([])
            room.append(seq_len)
            with_room = [len(rows) - 1]
        fullest = min(with_room, key=room.__getitem__)
        rows[fullest].append(cut)
        room[fullest] -= length
    planes = [torch.stack([filled(row, plane, seq_len) for row in rows]) for plane in PLANES] if rows else []
    if not planes:
        planes = [torch.empty(0, seq_len, dtype=torch.int64)] * len(PLANES)
    tokens, labels, positions, groups = planes
    return Part(
        name=name,
        tokens_RL=tokens,
        labels_RL=labels,
        positions_RL=positions,
        groups_RL=groups,
        num_groups=num_groups,
        about=about,
    )


# What each plane has of an example, and what it has where there is none.
PLANES = (
    (lambda one: one.tokens_T[:-1], 0),
    (lambda one: torch.where(one.groups_T[1:] >= 0, one.tokens_T[1:], IGNORED), IGNORED),
    (lambda one: torch.arange(len(one.tokens_T) - 1), PADDING_POSITION),
    (lambda one: one.groups_T[1:].clamp_min(0), 0),
)


def filled(row: list[Example], plane: tuple, seq_len: int) -> Tensor:
    of_example, blank = plane
    values = torch.cat([of_example(example) for example in row])
    return torch.nn.functional.pad(values, (0, seq_len - len(values)), value=blank)


def share_of(
    part: Part, *, reader: int, num_readers: int, micro_batch: int, multiple: int = 1
) -> list[tuple[Tensor, ...]]:
    """The microbatches of one reader: equally many for each, the last ones filled up with blank rows, and
    rows with padding up to a multiple of tokens.
    """
    step = num_readers * micro_batch
    missing, padding = -len(part.tokens_RL) % step, -part.tokens_RL.shape[1] % multiple
    blanks = [blank for _, blank in PLANES]
    batches = list[tuple[Tensor, ...]]()
    own = slice(reader, None, num_readers)
    for plane, blank in zip(part.planes, blanks, strict=True):
        whole = torch.nn.functional.pad(plane, (0, padding, 0, missing), value=blank)
        batches.append(whole[own].split(micro_batch))
    return list(zip(*batches, strict=True))
