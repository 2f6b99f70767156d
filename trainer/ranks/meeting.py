"""How do the ranks of a job agree before they have a process group?

Data workers are forked while neither CUDA nor NCCL nor gloo has started: none of them survives a fork, and on
InfiniBand a job was seen to hang. Until then the ranks know each other through torch's store, by which a
process group would find itself; and afterwards, or where somebody has made a group before, through the group.
"""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch.distributed as dist

from trainer.config import ConfigError
from trainer.ranks import agree

T = TypeVar("T")


class Meeting:
    """Of a job of one rank, or of ranks that have a group. `store`: None, for the group has one already."""

    def __init__(self, *, rank: int = 0, num_ranks: int = 1) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.local_rank = int(os.environ.get("LOCAL_RANK", rank))
        self.store: dist.Store | None = None

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Each rank's value, on all ranks. Collective."""
        return [value] if self.num_ranks == 1 else agree.all_gather_objects(value)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on all ranks. Collective."""
        return value if self.num_ranks == 1 else agree.broadcast_object(value)

    def together(self, action: Callable[[], T]) -> T:
        """All ranks act; where one fails, all do. Collective.

        Raises: what the action raised; on ranks where it went well, ConfigError or RuntimeError with the
        number of the rank.
        """
        result, raised = None, None
        try:
            result = action()
        except Exception as error:  # noqa: BLE001  # raised below, once the others know
            raised = error
        said = raised and [isinstance(raised, ConfigError), str(raised)]
        answers = self.all_gather_objects(said)
        if raised is not None:
            raise raised
        for rank, answer in enumerate(answers):
            if answer is not None:
                kind = ConfigError if answer[0] else RuntimeError
                raise kind(f"rank {rank}: {answer[1]}")
        return result  # type: ignore[return-value]  # of a T that may be None

    def first_of_host(self, action: Callable[[], T]) -> T:
        """All ranks act, the first of each host before the others: it makes what they will find. Collective.

        Raises: as `together`.
        """
        turns = [lambda: None, lambda: None]
        turns[min(self.local_rank, 1)] = action
        return [self.together(turn) for turn in turns][min(self.local_rank, 1)]


class StoreMeeting(Meeting):
    """Of ranks that have a store only. What one rank has to say all read: most have nothing to say."""

    def __init__(self, store: dist.Store, *, rank: int, num_ranks: int, timeout_s: float) -> None:
        super().__init__(rank=rank, num_ranks=num_ranks)
        self.store, self.timeout_s, self.calls = store, timeout_s, count()

    def all_gather_objects(self, value: Any) -> list[Any]:
        """None costs nothing; any other value is JSON, read by every rank."""
        key = f"triquetra/{next(self.calls)}"
        if value is not None:
            number = self.store.add(f"{key}/said", 1)
            self.store.set(f"{key}/said/{number}", json.dumps([self.rank, value], default=str))
        self.wait_for_all(f"{key}/come")
        values: list[Any] = [None] * self.num_ranks
        if num_said := self.store.add(f"{key}/said", 0):
            for text in self.store.multi_get([f"{key}/said/{i + 1}" for i in range(num_said)]):
                rank, said = json.loads(text)
                values[rank] = said
        self.wait_for_all(f"{key}/gone", hosts_only=True)
        return values

    def broadcast_object(self, value: Any) -> Any:
        return self.all_gather_objects(value if self.rank == 0 else None)[0]

    def wait_for_all(self, key: str, *, hosts_only: bool = False) -> None:
        """hosts_only: rank 0 alone waits. It may hold the store, and must not end before all have read."""
        if self.store.add(key, 1) == self.num_ranks:
            self.store.set(f"{key}/all", "")
        if hosts_only and self.rank:
            return
        try:
            self.store.wait([f"{key}/all"], timedelta(seconds=self.timeout_s))
        except dist.DistError as error:
            missing = f"not all of the {self.num_ranks} ranks came within timeout_s={self.timeout_s:g} s"
            raise TimeoutError(f"{missing}, or rank 0 has ended ({error})") from error


def meet(*, timeout_s: float) -> Meeting:
    """The ranks that the launcher has started. Raises: what torch raises where they cannot be reached."""
    if dist.is_initialized():
        return Meeting(rank=dist.get_rank(), num_ranks=dist.get_world_size())
    if "RANK" not in os.environ:  # no launcher: this process is the job
        return Meeting()
    store, rank, num_ranks = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    return StoreMeeting(store, rank=rank, num_ranks=num_ranks, timeout_s=timeout_s)
