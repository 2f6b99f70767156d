"""What do cut rows cost: who has most to do, what is sent, and how do memory and time grow with a row?

python -m benchmarks.context balance    work of the slowest rank of a row over the mean, Large at 256K
python -m benchmarks.context bytes      what a rank receives, Large at 256K
python -m benchmarks.context memory     peak memory and time of a layer and a step against L, on this CPU
"""

import math
import random
import resource
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from trainer.config import ModelConfig, load
from trainer.model.afmoe import afmoe_config, step_flops
from trainer.model.attention import QUERY_BLOCK
from trainer.model.context import Cut
from trainer.model.loss import linear_cross_entropy
from trainer.ranks.device import keep_freed_memory

LENGTH, ROWS = 262_144, 24
SIZES = (4, 8, 16, 32)
MIB = 2**20


def large() -> ModelConfig:
    return load(["experiment=trinity_large"]).model


# -- balance ----------------------------------------------------------------------------------------------


class Contiguous(Cut):
    """For comparison: each rank has one piece."""

    def held(self, length: int, *, rank: int | None = None) -> list[range]:
        rank, step = self.rank if rank is None else rank, length // self.size
        return [range(rank * step, (rank + 1) * step)]


class Turns(Cut):
    """For comparison: as many turns as are asked for, in `window`."""

    def turns(self, length: int) -> int:
        return self.window


def mean(low: int, high: int) -> float:
    """Of a log-uniform draw."""
    return (high - low) / math.log(high / low)


def packed_positions(draw: random.Random, length: int, *, long_share: float) -> torch.Tensor:
    """Of one row of a stream: that share of the tokens is in documents of half a row to a row, the rest in
    documents of 256 tokens to a 16th of a row; lengths log-uniform. The first is cut somewhere, as a stream's is.
    """
    filled, row = 0, list[torch.Tensor]()
    long, short = (length // 2, length), (min(256, length // 32), length // 16)
    of_long, of_short = (share / mean(*kind) for share, kind in ((long_share, long), (1 - long_share, short)))
    while filled < length:
        low, high = long if draw.random() < of_long / (of_long + of_short) else short
        size = int(low * (high / low) ** draw.random())
        start = draw.randrange(size) if not row else 0
        row.append(torch.arange(start, size)[: length - filled])
        filled += len(row[-1])
    return torch.cat(row)


def slowest_over_mean(model: ModelConfig, cuts: list[Cut], rows: list[torch.Tensor]) -> float:
    """In FLOP of a step; the mean over the rows, as each group of ranks waits for its slowest."""
    ratios = []
    for positions_L in rows:
        work = [step_flops(model, cut.own(positions_L[None])) for cut in cuts]
        ratios.append(max(work) / (sum(work) / len(work)))
    return sum(ratios) / len(ratios)


def rows_of(long_share: float, length: int = LENGTH, count: int = ROWS) -> list[torch.Tensor]:
    draw = random.Random(0)
    return [packed_positions(draw, length, long_share=long_share) for _ in range(count)]


def balance() -> None:
    model = large()
    kinds: dict[str, Callable[[int, int], Cut]] = {
        "contiguous": lambda size, rank: Contiguous(size=size, rank=rank),
        "1 turn": lambda size, rank: Turns(size=size, rank=rank, window=1),
        "ours": lambda size, rank: Cut(size=size, rank=rank, window=model.window),
        "4 turns": lambda size, rank: Turns(size=size, rank=rank, window=4),
        "8 turns": lambda size, rank: Turns(size=size, rank=rank, window=8),
    }
    rows = {"one document": [torch.arange(LENGTH)], "90 %": rows_of(0.9), "50 %": rows_of(0.5)}
    print("| rows | cp |", " | ".join(kinds), "| turns of ours |")
    print("|---|---|" + "---|" * len(kinds) + "---|")
    for name, of_kind in rows.items():
        for size in SIZES:
            ratios = [
                slowest_over_mean(model, [make(size, rank) for rank in range(size)], of_kind)
                for make in kinds.values()
            ]
            turns = Cut(size=size, window=model.window).turns(LENGTH)
            print(
                f"| {name} | {size} |",
                " | ".join(f"{ratio:.2f}" for ratio in ratios),
                f"| {turns} |",
                flush=True,
            )


# -- bytes ------------------------------------------------------------------------------------------------


def mean_received(cuts: list[Cut], window: int | None, *, token: int) -> float:
    """[bytes] of a row in one pass of one layer."""
    return token * sum(sum(cut.exchange(LENGTH, window).receive_counts) for cut in cuts) / len(cuts)


def sent() -> None:
    m = large()
    token = 2 * m.num_kv_heads * m.head_dim * 2
    num_global = m.num_layers // m.global_every
    print(
        "| cp | turns | local layer | global layer | all layers, 3 passes | gathered everywhere | Ulysses, any layer |"
    )
    print("|---|---|---|---|---|---|---|")
    for size in SIZES:
        cuts = [Cut(size=size, rank=rank, window=m.window) for rank in range(size)]
        local, whole = (mean_received(cuts, window, token=token) for window in (m.window, None))
        gathered = token * LENGTH * (size - 1) / size
        every = 3 * ((m.num_layers - num_global) * local + num_global * whole)
        # queries and outputs, keys and values: each rank keeps 1 / C of its own
        ulysses = 2 * (2 * m.num_heads + 2 * m.num_kv_heads) * m.head_dim * LENGTH / size * (size - 1) / size
        if size > m.num_kv_heads:  # heads of keys and values are copied
            ulysses = 2 * (2 * m.num_heads + 2 * size) * m.head_dim * LENGTH / size * (size - 1) / size
        print(
            f"| {size} | {cuts[0].turns(LENGTH)} | {local / MIB:,.0f} MiB | {whole / MIB:,.0f} MiB "
            f"| {every / MIB / 1024:,.0f} GiB | {3 * m.num_layers * gathered / MIB / 1024:,.0f} GiB "
            f"| {ulysses / MIB:,.0f} MiB |"
        )


COMMANDS = {"balance": balance, "bytes": sent}


if __name__ == "__main__":
    COMMANDS[sys.argv[1]]()
